# SPDX-License-Identifier: Apache-2.0
"""An adapter of this project as one that PEFT loads on the Hugging Face base, and what serves PEFT adapters with it.

Where a family keeps q, k and v in one matrix (GPT-2's c_attn, GPT-NeoX's query_key_value) PEFT knows one adapter for
the three. Ours are stacked into it exactly:

    A = [A_q; A_v]  [r_q + r_v, in]        B = rows of q: [B_q, 0], rows of k: 0, rows of v: [0, B_v]

so B A is the same matrix, at the sum of the ranks. Adapters that share their A (as imported ones do) need no zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_megatron.checkpoint.adapter import CONFIG, TENSORS
from lora_megatron.checkpoint.adapter_reader import AdapterReader
from lora_megatron.checkpoint.folder import write_json
from lora_megatron.checkpoint.new_folder import new_folder
from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.checkpoint import HfCheckpoint
from lora_megatron.huggingface.families import Family
from lora_megatron.huggingface.layout import module_path, projection_rows
from lora_megatron.model.shape import ModelShape
from lora_megatron.strict_safetensors import SafetensorsWriter

PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftPair:
    """One module's adapter as PEFT has it."""

    a: Tensor
    """[r, in]."""
    b: Tensor
    """[out of the module, r]."""
    scale: float


def export_adapter(base: Path, adapter: Path, out: Path, *, any_base: bool = False) -> dict[str, Any]:
    """Write `out`, a PEFT adapter folder for the Hugging Face model `base`; returns its configuration.

    `any_base` takes an adapter whose fingerprint is another base's; shapes must fit all the same.

    Raises:
        CheckpointError: damaged files, an adapter of another base, or one that is not LoRA.
        ConfigError: `out` exists.
    """
    with HfCheckpoint(base) as checkpoint:
        fingerprint = None if any_base else checkpoint.fingerprint()
        family, shape = checkpoint.family, checkpoint.shape
    with AdapterReader(adapter, shape, base_fingerprint=fingerprint) as reader, new_folder(out) as folder:
        if reader.method is None:
            raise CheckpointError(
                f"{adapter} was trained by {reader.facts.get('method')}, which PEFT has no adapter for: use "
                "lora-megatron merge"
            )
        pairs = {module: _pair(reader, family, where) for module, where in modules_of(reader, family).items()}
        config = _config(pairs, reader, family, base)
        entries = [
            (f"{PREFIX}{module}.lora_{factor}.weight", tensor)
            for module, pair in sorted(pairs.items())
            for factor, tensor in (("A", pair.a), ("B", pair.b))
        ]
        shapes = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in entries]
        with SafetensorsWriter(folder / TENSORS, shapes, {"format": "pt"}) as writer:
            for name, tensor in entries:
                writer.write(name, tensor)
        write_json(folder / CONFIG, config)
    return config


def modules_of(reader: AdapterReader, family: Family) -> dict[str, list[tuple[int, str]]]:
    """The family's module -> the adapted (layer, projection)s in it."""
    modules: dict[str, list[tuple[int, str]]] = {}
    for layer, projection in reader.adapted():
        modules.setdefault(module_path(family, layer, projection), []).append((layer, projection))
    return modules


def _pair(reader: AdapterReader, family: Family, where: list[tuple[int, str]]) -> PeftPair:
    pairs = [reader.pair(*place) for place in where]
    scales = [reader.scale(*place) for place in where]
    rows = [projection_rows(family, reader.shape, projection) for _, projection in where]
    out = rows[0].groups * rows[0].stride
    first_a, first_b = pairs[0]
    if len(pairs) == 1 and rows[0].rows == out:
        return PeftPair(first_a, first_b, scales[0])
    shared = all(torch.equal(a, first_a) for a, _ in pairs) and len(set(scales)) == 1
    ranks = [0 if shared else a.shape[0] for a, _ in pairs]
    width = first_a.shape[0] if shared else sum(ranks)
    b = torch.zeros(out, width, dtype=first_b.dtype)
    for index, (part, (_, own)) in enumerate(zip(rows, pairs, strict=True)):
        start = sum(ranks[:index])
        target = part.rows_of(b)[..., start : start + own.shape[1]]
        target.copy_((own * (scales[index] / scales[0])).view_as(target))
    a = first_a if shared else torch.cat([a for a, _ in pairs])
    return PeftPair(a, b, scales[0])


def _config(pairs: Mapping[str, PeftPair], reader: AdapterReader, family: Family, base: Path) -> dict[str, Any]:
    """PEFT's LoraConfig; modules off the commonest rank and alpha are named in the patterns."""
    assert reader.method is not None
    stabilised = reader.method.rank_stabilised
    ranks = {module: pair.a.shape[0] for module, pair in pairs.items()}
    alphas = {module: _alpha(pair, stabilised=stabilised) for module, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": stabilised,
        "target_modules": _target_modules(set(pairs), reader.shape, family),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": family.transposed,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _alpha(pair: PeftPair, *, stabilised: bool) -> int | float:
    """The alpha that gives `scale` at this rank; a whole number as such, free of the last bit's rounding."""
    rank = pair.a.shape[0]
    alpha = pair.scale * (math.sqrt(rank) if stabilised else rank)
    nearest = round(alpha, 9)
    divisor = math.sqrt(rank) if stabilised else rank
    alpha = nearest if nearest / divisor == pair.scale else alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(modules: set[str], shape: ModelShape, family: Family) -> list[str]:
    """The shortest endings that name these modules and no other of the model (PEFT compares endings)."""
    every = {
        module_path(family, layer, projection) for layer in range(shape.num_layers) for projection in shape.projections
    }
    chosen = set()
    for module in modules:
        parts = module.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        chosen.add(next(e for e in endings if {m for m in every if m == e or m.endswith(f".{e}")} <= modules))
    return sorted(chosen)
