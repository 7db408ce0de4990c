# SPDX-License-Identifier: Apache-2.0
"""GPTs with LoRA that are not ours, made on the device with random weights, and a plain training step on them.

Two of them: Hugging Face PEFT on transformers' GPT-2 (LoRA on c_attn, which is q, k and v in one), and a GPT of
ordinary torch layers as one would write it by hand, LoRA beside nn.Linear on q and v as loralib computes it. Both in
bf16, adapters too, so that neither casts between precisions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.errors import ConfigError, NumericalError
from lora_megatron.measure.memory import ActivationMeter

PRECISION = torch.bfloat16
_STANDARD_DEVIATION = 0.02  # GPT-2's


@dataclass(frozen=True)
class Sizes:
    """Of the one shape that all models have."""

    layers: int
    hidden: int
    heads: int
    sequence: int
    vocabulary: int
    rank: int
    alpha: float


class Lora(nn.Module):
    """(alpha / r) B A x, a product after the other."""

    def __init__(self, hidden: int, rank: int, alpha: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        self.lora_A = nn.Parameter(torch.empty(rank, hidden).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(hidden, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.lora_A), self.lora_B) * self.scale


class PlainBlock(nn.Module):
    """Attention and MLP of GPT-2, [b, s, h] -> [b, s, h]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        h = sizes.hidden
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)
        self.lora_q, self.lora_v = (Lora(h, sizes.rank, sizes.alpha) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = self.qkv(normed).chunk(3, -1)
        q, v = q + self.lora_q(normed), v + self.lora_v(normed)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class PlainGpt(nn.Module):
    """[b, s] tokens -> mean loss, over logits in fp32."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.sequence, sizes.hidden)
        self.blocks = nn.ModuleList(PlainBlock(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.words.weight).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PeftGpt(nn.Module):
    """transformers' GPT-2 under PEFT; it shifts labels itself, so the last position of a row has no loss."""

    def __init__(self, sizes: Sizes, *, checkpointing: bool, activation: str) -> None:
        super().__init__()
        try:
            import peft
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"no {error.name} here: pip install transformers peft, or leave peft out of --cases"
            ) from None
        config = transformers.GPT2Config(
            vocab_size=sizes.vocabulary,
            n_positions=sizes.sequence,
            n_embd=sizes.hidden,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            activation_function=activation,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        model = transformers.GPT2LMHeadModel(config)
        assert model.config._attn_implementation == "sdpa"
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = peft.LoraConfig(
            r=sizes.rank,
            lora_alpha=sizes.alpha,
            lora_dropout=0.0,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
        self.model: Any = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


@contextlib.contextmanager
def _made_on(device: torch.device) -> Iterator[None]:
    """Within, modules are born on `device` in PRECISION: nothing as large as a weight is drawn by a CPU or in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISION)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_rival(name: str, sizes: Sizes, *, activation: str) -> nn.Module:
    """`plain`, `peft` or `peft-checkpointing`, with all but the adapters frozen; `activation` is PEFT's GPT-2's."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with _made_on(device):
        model: nn.Module = (
            PlainGpt(sizes)
            if name == "plain"
            else PeftGpt(sizes, checkpointing=name == "peft-checkpointing", activation=activation)
        )
    for parameter_name, parameter in model.named_parameters():
        adapter = "lora_" in parameter_name
        parameter.requires_grad_(adapter)
        assert parameter.dtype == PRECISION, parameter_name
        if parameter.dim() == 2 and not adapter:
            nn.init.normal_(parameter, std=_STANDARD_DEVIATION)
    return model.train()


class RivalTrainer:
    """Whole steps: forward, loss, backward, clipping of the global norm, AdamW (torch's fused one)."""

    def __init__(self, model: nn.Module, *, lr: float, clip: float) -> None:
        self.model, self.meter = model, ActivationMeter([model])
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.clip = clip
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, fused=True)

    def step(self, tokens: Tensor, labels: Tensor, *, metered: bool) -> float:
        """Tokens and labels [b, s] on any device -> the loss; raises NumericalError for one that is not finite."""
        device = self.trained[0].device
        self.optimizer.zero_grad(set_to_none=True)
        with self.meter if metered else contextlib.nullcontext():
            loss = self.model(tokens.to(device), labels.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, self.clip)
            self.optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericalError(f"the loss is {value}: such a step measures nothing")
        return value


def count(parameters: Sequence[Tensor]) -> int:
    """Numbers in all of them."""
    return sum(parameter.numel() for parameter in parameters)
