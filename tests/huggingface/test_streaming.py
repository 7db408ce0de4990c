# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is loaded in the memory of a rank's own shard and one tensor, however large it is."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.checkpoint.base import base_tensor_names
from lora_megatron.config import MethodSection
from lora_megatron.huggingface.base import describe_hf_base
from lora_megatron.huggingface.configuration import read_configuration
from lora_megatron.huggingface.layout import stored_shapes
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.strict_safetensors import SafetensorsFile, SafetensorsWriter
from tests.pool import Pool

MIB = 2**20
LAYERS_PER_FILE = 4
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 64,
}


def write_checkpoint(
    folder: Path, config: dict[str, Any], *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> int:
    """A Llama of random weights in several files with an index, written a tensor at a time; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, shape = read_configuration(folder)
    shapes = dict(stored_shapes(family, shape, base_tensor_names(shape)))
    where = {name: f"model-{_file_of(name)}.safetensors" for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for file in set(where.values()):
        entries = [(name, dtype, shapes[name]) for name in sorted(shapes) if where[name] == file]
        with SafetensorsWriter(folder / file, entries, {"format": "pt"}) as writer:
            for name, _, size in entries:
                values = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device) * 0.02
                writer.write(name, values.to(dtype))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _file_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) // LAYERS_PER_FILE if parts[1] == "layers" else 0


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def reset_peak() -> int:
    """Let `peak` start anew; bytes of this process in memory now."""
    Path("/proc/self/clear_refs").write_text("5")  # importing a library can have taken more than what is measured
    return resident()


def peak() -> int:
    """The most bytes this process had in memory since `reset_peak`."""
    return _status("VmHWM")


def load(folder: Path, precision: str, *, whole: bool) -> dict[str, Any]:
    """On every rank: how far memory grew while the model was built and loaded, and the bytes of the shard.

    `whole` reads every tensor of the checkpoint besides, as a loader that does not stream would.
    """
    layout, method = Layout(tensor=2), choose_method(MethodSection(), num_layers=12)
    build_mesh(layout, seed=1)
    base = describe_hf_base(folder)
    build(replace(base.shape, num_layers=1, vocab_size=8), method, layout, BuildOptions())  # what it imports counts not
    gc.collect()
    before = reset_peak()
    chunks = build(base.shape, method, layout, BuildOptions(precision))
    base.load(chunks)
    grown = peak() - before
    if whole:
        kept = [
            file.tensor(name)[:] for file in map(SafetensorsFile, folder.glob("*.safetensors")) for name in file.entries
        ]
        grown = peak() - before
        assert kept
    shard = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    return {"grown": grown, "shard": shard}


@pytest.fixture
def fresh() -> Iterator[Pool]:
    """Processes whose peak no other test has raised."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.slow
def test_a_rank_needs_its_shard_and_one_tensor(fresh: Pool, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", CONFIG)
    largest = max(CONFIG["vocab_size"], CONFIG["intermediate_size"]) * CONFIG["hidden_size"] * 4
    for precision in ("bf16", "fp32"):
        for report in fresh.run(2, load, folder=tmp_path / "model", precision=precision, whole=False):
            limit = report["shard"] + largest
            assert limit < checkpoint * 0.65, "the limit must be far below the checkpoint"
            assert report["grown"] < limit + 16 * MIB, f"{report} {limit=} {checkpoint=}"
    for report in fresh.run(2, load, folder=tmp_path / "model", precision="fp32", whole=True):
        assert report["grown"] > checkpoint, "a loader that reads everything must not pass"
