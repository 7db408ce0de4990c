# SPDX-License-Identifier: Apache-2.0
"""The adapter file: what one task costs to store and ship.

`adapter_model.safetensors` holds whole factors under PEFT's names, gathered from every tensor and pipeline rank;
`adapter_config.json` is PEFT's; `manifest.json` adds hashes and what the adapter was trained on. Nothing in it knows
the layout, so it loads into any other bit-exactly. Methods that train existing parameters (BitFit, the top layers)
store those under their global names in the same way.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from lora_megatron.checkpoint.folder import Receipt, read_manifest, write_folder, write_json
from lora_megatron.checkpoint.tensors import TensorFiles, save_tensors, write_stage_file
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.sharding import Shard, shard_of
from lora_megatron.methods.lora import Lora
from lora_megatron.methods.method import Method
from lora_megatron.model.names import Named, adapter_key, named_parameters, peft_module
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import gather_text, together
from lora_megatron.strict_json import load_json_object
from lora_megatron.strict_safetensors import SafetensorsFile

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def describe_method(method: Method, shape: ModelShape) -> dict[str, Any]:
    """What an adapter of `method` is, in plain values: name, and for LoRA alpha, scaling and every rank."""
    facts: dict[str, Any] = {"method": method.name}
    if isinstance(method, Lora):
        ranks = {f"{i}.{p}": a.rank for i in range(shape.num_layers) for p in shape.projections
                 for a in method.adapters(i, p)}  # fmt: skip
        facts |= {"alpha": method.alpha, "rank_stabilised": method.rank_stabilised, "ranks": ranks}
    return facts


def peft_config(method: Lora, shape: ModelShape, base: str) -> dict[str, Any]:
    """PEFT's LoraConfig for this adapter; ranks that differ from the commonest go into `rank_pattern`."""
    ranks = {(i, p): a.rank for i in range(shape.num_layers) for p in shape.projections for a in method.adapters(i, p)}
    commonest = Counter(ranks.values()).most_common(1)[0][0]
    paths = {p: peft_module(p, gated=shape.gated_mlp) for p in shape.projections}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": commonest,
        "lora_alpha": method.alpha,
        "lora_dropout": 0.0,
        "use_rslora": method.rank_stabilised,
        "target_modules": _target_modules(ranks, shape),
        "rank_pattern": {f"layers.{i}.{paths[p]}": r for (i, p), r in ranks.items() if r != commonest},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _target_modules(ranks: Collection[tuple[int, str]], shape: ModelShape) -> list[str]:
    """A projection's name where every layer has it; else its path in each layer that does (PEFT compares endings)."""
    targets = set()
    for layer, projection in ranks:
        everywhere = all((other, projection) in ranks for other in range(shape.num_layers))
        path = peft_module(projection, gated=shape.gated_mlp)
        targets.add(path.rpartition(".")[2] if everywhere else f"layers.{layer}.{path}")
    return sorted(targets)


def adapter_part_name() -> str:
    """What this pipeline stage's part of an adapter is called until the parts are joined."""
    return f"part-{mpu.get_pipeline_model_parallel_rank():05d}.safetensors"


def adapter_tensors(chunks: Sequence[nn.Module], shape: ModelShape) -> Iterator[tuple[str, Tensor, Shard]]:
    """(PEFT's name, this tensor rank's part, shard) of this stage's trained parameters."""
    for named in trained_parameters(chunks):
        yield adapter_key(named.name, gated=shape.gated_mlp), named.parameter, shard_of(named.parameter)


def join_adapter_parts(temporary: Path, method: Method, shape: ModelShape, facts: dict[str, Any]) -> Receipt:
    """Rank 0, when every stage has written: one tensor file and its configuration in place of the parts.

    Answers the receipt of the tensor file.
    """
    parts = sorted(temporary.glob("part-*.safetensors"))
    metadata = {"format": "pt", "lora_megatron": json.dumps(facts, sort_keys=True)}
    with ExitStack() as opened:
        files = [opened.enter_context(SafetensorsFile(part)) for part in parts]
        tensors = {name: file.tensor(name) for file in files for name in file.entries}
        receipt = save_tensors(temporary / TENSORS, tensors, metadata)
    write_json(temporary / CONFIG, _config(method, shape, facts["base"]))
    for part in parts:
        part.unlink()
    return receipt


def save_adapter(
    folder: Path,
    chunks: Sequence[nn.Module],
    method: Method,
    shape: ModelShape,
    facts: dict[str, Any],
    **more: Any,
) -> None:
    """Write the adapter folder with all ranks, replacing an older one in one step.

    `facts` are written beside the tensors: base, base_fingerprint, seed, and those of `describe_method`; `more` only
    into the manifest.

    Raises:
        CheckpointError: on all ranks; nothing half-written remains and an older adapter is untouched.
    """

    def write(temporary: Path) -> dict[str, Any]:
        write_stage_file(temporary / adapter_part_name(), adapter_tensors(chunks, shape), {"format": "pt"})
        return {"kind": "adapter", "adapter": facts, **more}

    def finish(temporary: Path) -> None:
        join_adapter_parts(temporary, method, shape, facts)

    write_folder(folder, write, finish=finish, replace=True)


def load_adapter(
    folder: Path, chunks: Sequence[nn.Module], method: Method, shape: ModelShape, *, base_fingerprint: str
) -> None:
    """Fill the trained parameters of this rank's chunks; only this rank's bytes are read; collective.

    Raises:
        CheckpointError: on all ranks: damaged files, another base, method, rank or alpha, missing or unused tensors,
            wrong shapes, values that are not finite.
    """
    together(lambda: _check_facts(folder, method, shape, base_fingerprint))
    mine = {adapter_key(n.name, gated=shape.gated_mlp): n.parameter for n in trained_parameters(chunks, copies=True)}
    expected = {name for text in gather_text(json.dumps(list(mine))) for name in json.loads(text)}
    together(lambda: _fill(folder, mine, expected))


def _check_facts(folder: Path, method: Method, shape: ModelShape, base_fingerprint: str) -> None:
    """Whole, of this base and of this method, and the configuration other programs read says the same."""
    manifest = read_manifest(folder)
    facts = manifest.get("adapter")
    if not isinstance(facts, dict):
        raise CheckpointError(f"{folder} is not an adapter (its manifest says {manifest.get('kind')!r})")
    if facts.get("base_fingerprint") != base_fingerprint:
        raise CheckpointError(
            f"{folder} was trained on another base ({facts.get('base')}, fingerprint "
            f"{str(facts.get('base_fingerprint'))[:12]}); this base is {base_fingerprint[:12]}: give base.weights the "
            "model it belongs to"
        )
    for name, value in describe_method(method, shape).items():
        if facts.get(name) != value:
            raise CheckpointError(
                f"{folder}: {_difference(name, facts.get(name), value)}; give the method section of its run"
            )
    config = load_json_object(folder / CONFIG, "an adapter's configuration", CheckpointError)
    for name, value in _config(method, shape, config.get("base_model_name_or_path")).items():
        if config.get(name) != value:
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {config.get(name)!r}, and the adapter's tensors are of {value!r}"
            )


def _config(method: Method, shape: ModelShape, base: Any) -> dict[str, Any]:
    return peft_config(method, shape, base) if isinstance(method, Lora) else {"method": method.name}


def _fill(folder: Path, mine: dict[str, nn.Parameter], expected: set[str]) -> None:
    size = mpu.get_tensor_model_parallel_world_size()
    with TensorFiles([folder / TENSORS]) as tensors, torch.no_grad():
        tensors.require_names(expected, str(folder / TENSORS))
        for key, parameter in mine.items():
            shard = shard_of(parameter)
            parameter.copy_(tensors.part(key, shard, shape=shard.full_shape(parameter.shape, size)))


def trained_parameters(chunks: Sequence[nn.Module], *, copies: bool = False) -> list[Named]:
    """This rank's trained parameters; the second copy of a tied embedding only with `copies`."""
    return [n for n in named_parameters(chunks) if n.parameter.requires_grad and (copies or not n.is_copy)]


def _difference(name: str, stored: Any, wanted: Any) -> str:
    if name == "ranks" and isinstance(stored, dict):
        for key in sorted(set(stored) | set(wanted)):
            if stored.get(key) != wanted.get(key):
                layer, projection = key.split(".")
                return (
                    f"rank of {projection} in layer {layer} is {stored.get(key, 'absent')}, "
                    f"this run has {wanted.get(key, 'none')}"
                )
    return f"{name} is {stored!r}, this run has {wanted!r}"
