# SPDX-License-Identifier: Apache-2.0
"""Hugging Face bases on a GPU: every family's logits, and a Llama-3-8B-shaped checkpoint from file to merged file.

    python -m pytest tests/huggingface/test_gpu.py -m gpu -s

The second writes and merges 16 GB of random weights; its numbers are what it prints. Both run small on a CPU too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lora_megatron.checkpoint.adapter import describe_method, save_adapter
from lora_megatron.config import MethodSection, OptimizerSection
from lora_megatron.huggingface.base import describe_hf_base
from lora_megatron.huggingface.merge import merge
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.huggingface.models import FAMILIES, model_class, tokens
from tests.huggingface.test_streaming import CONFIG, peak, reset_peak, write_checkpoint
from tests.pool import Pool

one_gpu = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")]
LLAMA3_8B = {
    **CONFIG,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
TINY = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
WARM_UP, TIMED = 3, 10


@pytest.fixture(scope="module")
def nccl() -> Iterator[Pool]:
    """One process on the first GPU."""
    pool = Pool(1, backend="nccl")
    yield pool
    pool.close()


def family_beside_transformers(folder: Path, name: str) -> tuple[float, float]:
    """Largest difference of logits in fp32 on this process's device, and their size."""
    torch.set_float32_matmul_precision("highest")
    ranks = build_mesh(Layout(), seed=1)
    base = describe_hf_base(folder)
    chunks = build(base.shape, choose_method(MethodSection(), num_layers=4), Layout(), BuildOptions())
    base.load(chunks)
    ids = tokens().to(ranks.device)
    reference = model_class(name).from_pretrained(folder, attn_implementation="eager").to(ranks.device).eval()
    with torch.no_grad():
        ours = chunks[0](ids, torch.arange(ids.shape[1], device=ranks.device).expand_as(ids), None)
        theirs = reference(ids).logits
    return float((ours[..., : theirs.shape[-1]] - theirs).abs().max()), float(theirs.std())


@pytest.mark.parametrize("name", [pytest.param(name, marks=one_gpu) for name in FAMILIES])
def test_logits_on_a_gpu(nccl: Pool, saved: Callable[[str], Path], name: str) -> None:
    difference, size = nccl.run(1, family_beside_transformers, folder=saved(name), name=name)[0]
    assert size > 0.3
    assert difference < 1e-4


def train_from(folder: Path, adapter: Path, length: int) -> dict[str, Any]:
    """Load, train a few steps on one repeated row, save the adapter: seconds, bytes and losses."""
    ranks = build_mesh(Layout(), seed=1)
    cuda = ranks.device.type == "cuda"
    started = time.perf_counter()
    base = describe_hf_base(folder)
    described = time.perf_counter() - started
    method = choose_method(MethodSection(targets={"q": 16, "v": 16}, alpha=32), num_layers=base.shape.num_layers)
    before = reset_peak()
    chunks = build(base.shape, method, Layout(), BuildOptions("bf16"))
    started = time.perf_counter()
    base.load(chunks)
    report: dict[str, Any] = {
        "seconds to describe": round(described, 2),
        "seconds to load": round(time.perf_counter() - started, 2),
        "host bytes grown by loading": peak() - before,
        "weight bytes": sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters()),
    }
    ddp = wrap_ddp(chunks, sharding="none", precision="bf16")
    optimizer = choose_optimizer(ddp, OptimizerSection(lr=1e-3), precision="bf16")
    optimizer.refresh_master()
    ids = row(base.shape.vocab_size, length)
    batch = {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "loss_mask": torch.ones(1, length),
        "position_ids": torch.arange(length)[None],
        "attention_mask": None,
        "first_sample": 0,
    }
    losses, seconds = [], []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = run_microbatches(ddp, [batch])
        losses.append(loss.mean)
        optimizer.step(loss.tokens)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    steady = sorted(seconds[WARM_UP:])
    report |= {
        "losses": losses,
        "after": run_microbatches(ddp, [batch], forward_only=True).mean,
        "tokens per second (median step)": round(length / steady[len(steady) // 2]),
        "step seconds, fastest and slowest": [round(steady[0], 4), round(steady[-1], 4)],
        "peak GPU bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }
    facts = {"base": str(folder), "base_fingerprint": base.fingerprint, "seed": 0}
    save_adapter(adapter, chunks, method, base.shape, {**facts, **describe_method(method, base.shape)})
    return report


def row(vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(3))


def from_file_to_file(pool: Pool, folder: Path, config: dict[str, Any], length: int, device: str) -> dict[str, Any]:
    """The whole way; the merged model's loss is transformers'."""
    import transformers

    size = write_checkpoint(folder / "base", config, dtype=torch.bfloat16, device=device)
    report = pool.run(1, train_from, folder=folder / "base", adapter=folder / "adapter", length=length)[0]
    report["checkpoint bytes"] = size
    before, started = reset_peak(), time.perf_counter()
    merge(folder / "base", folder / "adapter", folder / "merged")
    report["seconds to merge"] = round(time.perf_counter() - started, 2)
    report["host bytes grown by merging"] = peak() - before
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "merged", dtype=torch.bfloat16).to(device)
    ids = row(config["vocab_size"], length).to(device)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0].float()
    report["transformers' loss of the merged model"] = float(functional.cross_entropy(logits, ids[0, 1:]))
    return report


def check(report: dict[str, Any]) -> None:
    assert math.isfinite(report["after"])
    assert report["after"] < report["losses"][0] - 0.05, "one row over and over is learnt"
    # Both in bf16, by other kernels, and the merged weights are rounded once more.
    assert report["transformers' loss of the merged model"] == pytest.approx(report["after"], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(LLAMA3_8B, marks=one_gpu, id="llama3-8b")])
def test_from_file_to_merged_file(
    nccl: Pool, tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = from_file_to_file(nccl, tmp_path, config, 2048, "cuda")
    with capsys.disabled():
        print(f"\n{json.dumps(report, indent=1)}")
    check(report)
    assert report["host bytes grown by loading"] < 6 * 2**30, "the model is on the GPU; the host holds a tensor"


def test_rehearsal(pool: Pool, tmp_path: Path) -> None:
    check(from_file_to_file(pool, tmp_path, TINY, 32, "cpu"))
