# SPDX-License-Identifier: Apache-2.0
"""Build this rank's part of the model: megatron-core GPTModels, adapted at birth, frozen where the method says so."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from lora_megatron.layers.activation import ACTIVATIONS
from lora_megatron.layers.output_layer import StoredOutputLayer
from lora_megatron.layers.rope import attention_factor, inverse_frequencies
from lora_megatron.layers.sharding import REPLICATED, Shard, declare
from lora_megatron.layers.smoothing import Smoothing
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.methods.method import Method
from lora_megatron.model.gpt import Gpt
from lora_megatron.model.names import EMBEDDING, OUTPUT, POSITIONS, named_parameters
from lora_megatron.model.recomputation import CORE_ATTENTION, first_of_units, rebuilds_attention, rebuilt_mlps
from lora_megatron.model.shape import ModelShape
from lora_megatron.model.spec import block_spec
from lora_megatron.model.transposes import keep_transposes
from lora_megatron.parallel.groups import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VOCABULARY_MULTIPLE = 128  # padded rows keep the GEMM's shape friendly and the embedding divisible


@dataclass(frozen=True)
class BuildOptions:
    """How to build, as opposed to what."""

    precision: str = "fp32"
    recompute: str = "none"
    dropout: float = 0.0
    adapter_seed: int = 0
    storage: StorageFormat | None = None
    """Format of the linear weights that are frozen; None keeps them in `precision`."""
    transposes_kept: int = 0
    """Of how many of this rank's layers, the last ones, FP8 weights turned round are kept for good."""
    transposes_in_host: bool = False
    """Keep those of the other layers' MLPs in the host's memory (`model.transposes`)."""
    head: StorageFormat | None = None
    """Format of the frozen output layer's weight, FP8; None multiplies with it as it is."""
    recompute_modules: tuple[str, ...] = CORE_ATTENTION
    """With recompute `selective`: of which parts (`model.recomputation`)."""
    recompute_layers: int | None = None
    """With recompute `full`, or `selective` of `mlp`: of each chunk the first so many; None is all."""
    recompute_unit: int = 1
    """With recompute `full` of all layers: how many are rebuilt together."""
    meta: bool = False
    """Build without storage, to count parameters of a model of any size."""
    label_smoothing: float = 0.0
    attention: str = "torch"
    """Whose kernels core attention runs on (`layers.attention`)."""
    tp_comm_overlap: bool = False
    """Hide the collectives of sequence parallelism behind products (`layers.exchange`)."""
    pp_comm_copy: bool = False
    """Have copy engines bring what stages send each other (`parallel.stage_copies`)."""


class _ShapesOnly(Gpt):
    """A model whose weights are never there: its two copies of a tied embedding have nothing to send each other."""

    def _is_in_embd_group(self) -> bool:
        return False


def megatron_config(shape: ModelShape, layout: Layout, options: BuildOptions) -> TransformerConfig:
    """megatron-core's configuration: no fusion that needs a compiler, no initialisation (weights are drawn here)."""
    dtype = DTYPES[options.precision]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=ACTIVATIONS[shape.activation],  # for its checks; `layers.mlp` computes it
        gated_linear_unit=shape.gated_mlp,
        add_bias_linear=shape.linear_bias,
        qk_layernorm=shape.qk_norm,  # their gradients are then summed over the tensor group: each rank has its heads
        softmax_scale=_softmax_scale(shape),
        **_window(shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        tp_comm_overlap=options.tp_comm_overlap,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.precision == "bf16",
        # With two stages the neighbours of the interleaved schedule are one and the same rank, and a batch of sends
        # and receives between two ranks has no defined order: messages of both directions must not be batched.
        # Outputs are let go of by ourselves (`parallel.sent_outputs`), not by deallocate_pipeline_outputs.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        perform_initialization=False,
        use_cpu_initialization=options.meta,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=torch.cuda.is_available() and not options.meta,  # compiled; on a CPU that costs a compiler
        apply_rope_fusion=False,
        **_recomputation(options),
    )


def _recomputation(options: BuildOptions) -> dict[str, object]:
    """megatron-core's words for which activations it rebuilds; fc1's output is `layers.frozen_mlp`'s to make again."""
    assert options.recompute != "auto", "it is settled before anything is built"
    if rebuilds_attention(options.recompute, options.recompute_modules):
        return {"recompute_granularity": "selective", "recompute_modules": list(CORE_ATTENTION)}
    if options.recompute != "full":
        return {}
    unit = options.recompute_unit
    if options.recompute_layers is None:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": unit}
    layers = options.recompute_layers
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def _softmax_scale(shape: ModelShape) -> float | None:
    """None is 1 / sqrt(d); yarn's factor on cos and sin of both q and k is its square on their product."""
    factor = attention_factor(shape.rope_scaling) if shape.position == "rope" else 1.0
    return None if factor == 1.0 else factor**2 / math.sqrt(shape.head_dim)


def _window(shape: ModelShape) -> dict[str, object]:
    """megatron-core's words for a sliding window: positions to the left, and 1 for each layer that has it."""
    if not shape.sliding_window:
        return {}
    layers = [int(shape.window(layer) > 0) for layer in range(shape.num_layers)]
    return {"window_size": (shape.sliding_window - 1, 0), "window_attn_skip_freq": layers}


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding in memory: a multiple of 128 that every tensor size up to 128 divides."""
    multiple = math.lcm(_VOCABULARY_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


def build(shape: ModelShape, method: Method, layout: Layout, options: BuildOptions) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual pipeline stage), weights not yet loaded.

    Parameters the method does not train have `requires_grad` off; each carries its sharding declaration.
    """
    config = megatron_config(shape, layout, options)
    padded = padded_vocabulary(shape.vocab_size, layout.tensor)
    count = layout.virtual_pipeline
    device = torch.device("meta" if options.meta else torch.cuda.current_device())
    chunks = []
    for index in range(count):
        vp_stage = index if count > 1 else None
        if vp_stage is not None:
            mpu.set_virtual_pipeline_model_parallel_rank(index)
        first = get_transformer_layer_offset(config, vp_stage)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage))
        with torch.device("meta") if options.meta else contextlib.nullcontext():
            chunk = (_ShapesOnly if options.meta else Gpt)(
                config=config,
                transformer_layer_spec=block_spec(
                    shape,
                    method,
                    layers,
                    dropout=options.dropout,
                    seed=options.adapter_seed,
                    storage=options.storage,
                    attention=options.attention,
                    rebuilt_mlps=rebuilt_mlps(
                        options.recompute, options.recompute_modules, options.recompute_layers, len(layers)
                    ),
                    first_of_units=first_of_units(
                        options.recompute, options.recompute_layers, options.recompute_unit, len(layers)
                    ),
                ),
                vocab_size=padded,
                max_sequence_length=shape.max_position_embeddings,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                share_embeddings_and_output_weights=shape.tied_embeddings,
                position_embedding_type="rope" if shape.position == "rope" else "learned_absolute",
                rotary_percent=shape.rotary_percent,
                rotary_base=shape.rotary_base,
                vp_stage=vp_stage,
            )
        if shape.position == "rope":
            chunk.rotary_pos_emb.inv_freq = inverse_frequencies(
                shape.rotary_dim, base=shape.rotary_base, scaling=shape.rope_scaling
            ).to(device)
        chunks.append(chunk.to(device=device, dtype=DTYPES[options.precision]))
    for chunk in chunks:
        if options.head is not None and chunk.post_process:
            weight = chunk.shared_embedding_or_output_weight() if shape.tied_embeddings else chunk.output_layer.weight
            chunk.output_layer = StoredOutputLayer(chunk.output_layer, weight, options.head)
        _declare_embeddings(chunk, padding=padded - shape.vocab_size)
        chunk.mask_padded_vocabulary(shape.vocab_size)
        chunk.pp_comm_copy = options.pp_comm_copy
        chunk.smoothing = Smoothing(options.label_smoothing, shape.vocab_size)
    _freeze(chunks, method)
    keep_transposes(chunks, last=options.transposes_kept, in_host=options.transposes_in_host)
    if options.recompute == "full":
        for chunk in chunks:
            _let_gradient_reach_input(chunk)
    return chunks


def _declare_embeddings(chunk: GPTModel, *, padding: int) -> None:
    """The parameters megatron-core owns alone."""
    rows = Shard(0, padding=padding)
    for named in named_parameters([chunk]):
        if named.name in (EMBEDDING, OUTPUT):
            declare(named.parameter, rows)
        elif named.name == POSITIONS:
            declare(named.parameter, REPLICATED)


def _freeze(chunks: list[GPTModel], method: Method) -> None:
    for named in named_parameters(chunks):
        named.parameter.requires_grad_(method.is_trainable(named.name))


def _let_gradient_reach_input(chunk: GPTModel) -> None:
    """Make the output of a frozen embedding require a gradient.

    Whole-layer recomputation runs its backward only if an input of the layer requires a gradient; with every weight
    below frozen none would, and half of the adapters would silently get zero gradients. Without recomputation the
    input is left alone: what lies below the lowest adapter then needs no gradient at all.
    """
    if not chunk.pre_process or any(p.requires_grad for p in chunk.embedding.parameters()):
        return

    def require(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    chunk.embedding.register_forward_hook(require)
