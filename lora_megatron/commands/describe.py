# SPDX-License-Identifier: Apache-2.0
"""What a folder holds, as plain values: headers, manifests and configurations are read, never a tensor as a whole."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from lora_megatron.checkpoint.adapter import TENSORS as ADAPTER_TENSORS
from lora_megatron.checkpoint.base import describe_base, read_tokenizer_fingerprint
from lora_megatron.checkpoint.folder import MANIFEST, read_manifest
from lora_megatron.checkpoint.state import checkpoints
from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.checkpoint import HfCheckpoint, is_checkpoint
from lora_megatron.strict_json import load_json_object
from lora_megatron.strict_safetensors import DTYPE_NAMES, SafetensorsFile, TensorSlice

Facts = dict[str, Any]
STATUS = "status.json"


def describe(folder: Path) -> Facts:
    """What `folder` is (`kind`) and what can be said of it without loading it, in JSON's types.

    Raises:
        CheckpointError: it is nothing that is known, or it is damaged.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give the folder of a model, an adapter, a checkpoint or a run")
    if is_checkpoint(folder):
        return _huggingface(folder)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, verify=False)
        kind = manifest.get("kind")
        if kind in _OURS:
            return _OURS[kind](folder, manifest)
    elif (folder / ADAPTER_CONFIG).exists():
        return _peft(folder)
    elif (folder / STATUS).exists():
        return _run(folder)
    raise CheckpointError(
        f"{folder} is none of these: Hugging Face model, model or adapter of this project, PEFT adapter, training "
        "checkpoint, run folder"
    )


def _huggingface(folder: Path) -> Facts:
    with HfCheckpoint(folder) as checkpoint:
        tied = {checkpoint.family.head} if checkpoint.shape.tied_embeddings else set()
        return {
            "kind": "Hugging Face model",
            "path": str(folder),
            "family": checkpoint.family.model_type,
            **_weights(tensor for name, tensor in checkpoint.tensors.items() if name not in tied),
            **_files(file.path for file in checkpoint.files),
            "fingerprint": checkpoint.fingerprint(),
            "shape": checkpoint.shape.to_dict(),
        }


def _model(folder: Path, manifest: Facts) -> Facts:
    base = describe_base(folder)
    return {
        "kind": "model",
        "path": str(folder),
        **_weights_in(folder, _tensor_files(manifest)),
        "fingerprint": base.fingerprint,
        "tokenizer_fingerprint": read_tokenizer_fingerprint(folder),
        **({"best": manifest["best"]} if "best" in manifest else {}),
        "shape": base.shape.to_dict(),
    }


def _adapter(folder: Path, manifest: Facts) -> Facts:
    return {
        "kind": "adapter",
        "path": str(folder),
        **_adapter_facts(manifest.get("adapter"), folder),
        **_weights_in(folder, _tensor_files(manifest)),
        **({"best": manifest["best"]} if "best" in manifest else {}),
    }


def _checkpoint(folder: Path, manifest: Facts) -> Facts:
    if not isinstance(manifest.get("identity"), dict):
        raise CheckpointError(f"{folder / MANIFEST} does not describe a training checkpoint")
    return {
        "kind": "training checkpoint",
        "path": str(folder),
        "step": manifest.get("step"),
        "consumed_samples": manifest.get("consumed_samples"),
        **_adapter_facts(manifest.get("adapter"), folder),
        **_weights_in(folder, _tensor_files(manifest)),
        "identity": manifest.get("identity"),
    }


_OURS: dict[str, Callable[[Path, Facts], Facts]] = {"model": _model, "adapter": _adapter, "checkpoint": _checkpoint}


def _peft(folder: Path) -> Facts:
    config = load_json_object(folder / ADAPTER_CONFIG, "the configuration of a PEFT adapter", CheckpointError)
    if "peft_type" not in config:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has no peft_type: it is not the configuration of an adapter")
    if not (folder / ADAPTER_TENSORS).exists():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_TENSORS}; an adapter_model.bin is a pickle and never read: save it again with "
            "PEFT's save_pretrained(DIR)"
        )
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "base_model_name_or_path")
    return {
        "kind": "PEFT adapter",
        "path": str(folder),
        **{key: config.get(key) for key in keys},
        **_weights_in(folder, [ADAPTER_TENSORS]),
    }


def _run(folder: Path) -> Facts:
    status = load_json_object(folder / STATUS, "the status of a run", CheckpointError)
    parts = [folder / "adapter", folder / "model", folder / "best", *checkpoints(folder)]
    return {
        "kind": "run",
        "path": str(folder),
        **{key: status[key] for key in ("state", "step", "time", "exit_status", "error") if key in status},
        "parts": [str(part) for part in parts if part.is_dir()],
    }


def _adapter_facts(facts: Any, folder: Path) -> Facts:
    if not isinstance(facts, dict) or not _makes_sense(facts.get("ranks", {}), facts.get("alpha", 0)):
        raise CheckpointError(f"{folder / MANIFEST} does not describe an adapter")
    keys = ("method", "ranks", "alpha", "rank_stabilised", "base", "base_fingerprint", "seed")
    return {key: facts[key] for key in keys if key in facts}


def _makes_sense(ranks: Any, alpha: Any) -> bool:
    return (
        isinstance(ranks, dict)
        and all(re.fullmatch(r"[0-9]{1,6}\.\w+", key) and type(rank) is int for key, rank in ranks.items())
        and isinstance(alpha, (int, float))
    )


def _tensor_files(manifest: Facts) -> list[str]:
    return sorted(name for name in manifest["files"] if name.endswith(".safetensors"))


def _weights_in(folder: Path, names: Iterable[str]) -> Facts:
    """Parameters, types and files of safetensors files."""
    paths = [folder / name for name in names]
    tensors = []
    for path in paths:
        with SafetensorsFile(path) as file:
            tensors += [file.tensor(name) for name in file.entries]
    return _weights(tensors) | _files(paths)


def _weights(tensors: Iterable[TensorSlice]) -> Facts:
    """How many numbers, and how many of each type."""
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        name = DTYPE_NAMES[tensor.dtype]
        dtypes[name] = dtypes.get(name, 0) + math.prod(tensor.shape)
    return {"parameters": sum(dtypes.values()), "dtypes": dtypes}


def _files(paths: Iterable[Path]) -> Facts:
    files = {path.name: path.stat().st_size for path in paths}
    return {"bytes": sum(files.values()), "files": files}


def compact_ranks(ranks: Mapping[str, int]) -> str:
    """{"0.q": 8, "1.q": 8, "0.v": 4, "1.v": 8} -> `q 8 in layers 0-1; v 4 in layer 0; v 8 in layer 1`."""
    layers: dict[tuple[str, int], list[int]] = {}
    for key, rank in ranks.items():
        layer, _, target = key.partition(".")
        layers.setdefault((target, rank), []).append(int(layer))
    together: dict[str, list[str]] = {}
    for (target, rank), where in layers.items():
        together.setdefault(_ranges(sorted(where)), []).append(f"{target} {rank}")
    return "; ".join(f"{', '.join(pairs)} in {where}" for where, pairs in together.items())


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> `layers 0-2,5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer {text}" if len(layers) == 1 else f"layers {text}"
