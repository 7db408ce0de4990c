# SPDX-License-Identifier: Apache-2.0
"""The base model's logits and loss equal those of transformers' models with the same weights.

Each runs unsharded in one worker process; that sharded equals unsharded is the oracle's affair.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.config import MethodSection, ModelSection
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.names import named_parameters
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.pool import Pool

VOCABULARY = 100


def our_model(section: dict[str, Any]) -> tuple[Any, Any, dict[str, Tensor]]:
    """Our unsharded model, its shape, and its weights by global name."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    shape = resolve_shape(ModelSection(**section), tokenizer_vocab_size=VOCABULARY)
    chunks = build(shape, choose_method(MethodSection(name="full"), num_layers=2), Layout(), BuildOptions())
    initialise_base(chunks, seed=3, num_layers=2)
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for named in named_parameters(chunks):
        with torch.no_grad():  # so that no weight is 0 or 1, and attention is far from uniform
            named.parameter.add_(torch.randn(named.parameter.shape, generator=generator) * 0.1)
        weights[named.name] = named.parameter.detach()[: VOCABULARY if "embedding.word" in named.name else None]
    return chunks[0], shape, weights


def unfused(fused: Tensor, shape: Any) -> list[Tensor]:
    """q, k and v rows of a fused QKV weight or bias, by cutting it into heads one by one."""
    per_group = shape.num_attention_heads // shape.num_query_groups
    heads = fused.split(shape.head_dim)
    groups = [heads[i : i + per_group + 2] for i in range(0, len(heads), per_group + 2)]
    q, k, v = [h for g in groups for h in g[:-2]], [g[-2] for g in groups], [g[-1] for g in groups]
    return [torch.cat(q), torch.cat(k), torch.cat(v)]


def as_gpt2(weights: dict[str, Tensor], shape: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=shape.max_position_embeddings,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_attention_heads,
        )
    )
    state = {
        "transformer.wte.weight": weights["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": weights["embedding.position_embeddings.weight"],
        "lm_head.weight": weights["embedding.word_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = weights[f"decoder.final_layernorm.{kind}"]
        for layer in range(shape.num_layers):
            mine, theirs = f"decoder.layers.{layer}", f"transformer.h.{layer}"
            of = {
                f"{theirs}.ln_1.{kind}": weights[f"{mine}.input_layernorm.{kind}"],
                f"{theirs}.ln_2.{kind}": weights[f"{mine}.pre_mlp_layernorm.{kind}"],
            }
            linears = {
                "attn.c_attn": torch.cat(unfused(weights[f"{mine}.self_attention.linear_qkv.{kind}"], shape)),
                "attn.c_proj": weights[f"{mine}.self_attention.linear_proj.{kind}"],
                "mlp.c_fc": weights[f"{mine}.mlp.linear_fc1.{kind}"],
                "mlp.c_proj": weights[f"{mine}.mlp.linear_fc2.{kind}"],
            }
            # GPT-2's Conv1D keeps its weight as [in, out].
            of |= {f"{theirs}.{name}.{kind}": w.t() if kind == "weight" else w for name, w in linears.items()}
            state |= of
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return model.eval()


def as_llama(weights: dict[str, Tensor], shape: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            max_position_embeddings=shape.max_position_embeddings,
            rms_norm_eps=shape.norm_epsilon,
        )
    )
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"][:VOCABULARY],
    }
    for layer in range(shape.num_layers):
        mine, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        q, k, v = unfused(weights[f"{mine}.self_attention.linear_qkv.weight"], shape)
        gate, up = weights[f"{mine}.mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{theirs}.input_layernorm.weight": weights[f"{mine}.input_layernorm.weight"],
            f"{theirs}.post_attention_layernorm.weight": weights[f"{mine}.pre_mlp_layernorm.weight"],
            f"{theirs}.self_attn.q_proj.weight": q,
            f"{theirs}.self_attn.k_proj.weight": k,
            f"{theirs}.self_attn.v_proj.weight": v,
            f"{theirs}.self_attn.o_proj.weight": weights[f"{mine}.self_attention.linear_proj.weight"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": weights[f"{mine}.mlp.linear_fc2.weight"],
        }
    model.load_state_dict(state)
    return model.eval()


def logits_beside_transformers(family: str, section: dict[str, Any]) -> tuple[float, float, float]:
    """Largest difference of logits, their size, and our loss less theirs, padded vocabulary included."""
    model, shape, weights = our_model(section)
    reference = {"gpt2": as_gpt2, "llama": as_llama}[family](weights, shape)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (2, 17), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(16).expand(2, 16)
    with torch.no_grad():
        ours = model(inputs, positions, None)
        theirs = reference(inputs).logits
        loss = model(inputs, positions, None, labels=labels).mean()
        their_loss = functional.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    if ours.shape[0] != theirs.shape[0]:
        ours = ours.transpose(0, 1)
    difference = float((ours[..., :VOCABULARY] - theirs).abs().max())
    return difference, float(theirs.std()), float(loss - their_loss)


@pytest.mark.parametrize(
    ("family", "section"),
    [
        ("gpt2", {"preset": "tiny"}),
        ("llama", {"preset": "tiny-llama"}),
        ("llama", {"preset": "tiny-llama", "num_query_groups": 1, "head_dim": 16}),
    ],
    ids=["gpt2", "llama-gqa", "llama-mqa"],
)
def test_logits_and_loss_equal_transformers(pool: Pool, family: str, section: dict[str, Any]) -> None:
    """Without the mask over padded vocabulary rows the loss would differ by some hundredths."""
    difference, size, loss = pool.run(1, logits_beside_transformers, family=family, section=section)[0]
    assert size > 0.1, "logits must say something"
    assert difference < 1e-4
    assert abs(loss) < 1e-5
