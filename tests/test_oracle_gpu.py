# SPDX-License-Identifier: Apache-2.0
"""The oracle over NCCL on two GPUs, and a training step of a slice of GPT-3 175B on one.

    python -m pytest tests/test_oracle_gpu.py -m "gpu or multigpu" -s

The same functions run small over gloo in the tests named `rehearsal`, so that they are sound when a GPU is there.
"""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu

from lora_megatron.config import MethodSection, ModelSection, OptimizerSection
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.comparison import compare, frobenius
from tests.gpus import one_gpu, two_gpus
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twins

# Scale alpha / r near 1, so that bf16's error of a gradient stays near its rounding; see test_oracle.
METHOD = {"targets": {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}, "alpha": 2}
EXPERIMENTS = [
    Experiment(method=METHOD),
    Experiment(method=METHOD, model={"preset": "tiny-llama", "num_layers": 4}),
    Experiment(method=METHOD, dropout=0.3, recompute="full"),
]
LAYOUTS = {
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
    "vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "dp2": Layout(),
}


def train_exactly(experiments: list[Experiment]) -> list[Record | None]:
    """Without TF32, whose ten bits of mantissa would pass for an error of parallelism."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return train_twins(experiments)


def runs(pool: Pool, world: int, layout: Layout, precision: str) -> list[Record]:
    experiments = [replace(experiment, layout=layout, precision=precision) for experiment in EXPERIMENTS]
    records: list[Record] = pool.run(world, train_exactly, experiments=experiments)[0]
    return records


_twins: dict[tuple[str, str], list[Record]] = {}


def twins(pool: Pool, precision: str) -> list[Record]:
    """The unsharded runs on the same kind of device, made once."""
    key = pool.backend, precision
    if key not in _twins:
        _twins[key] = runs(pool, 1, Layout(), precision)
    return _twins[key]


def check_fp32(pool: Pool, layout: Layout) -> None:
    for got, want in zip(runs(pool, 2, layout, "fp32"), twins(pool, "fp32"), strict=True):
        assert compare(got, want) > 100


def check_bf16(pool: Pool, layout: Layout) -> None:
    """bf16's distance from fp32 is what rounding costs; two runs that round on their own are sqrt(2) of it apart."""
    sharded, whole, exact = runs(pool, 2, layout, "bf16"), twins(pool, "bf16"), twins(pool, "fp32")
    for got, want, truth in zip(sharded, whole, exact, strict=True):
        assert got["complaints"] == []
        for step in range(len(want["loss"])):
            rounding = frobenius(want["grads"][step], truth["grads"][step])
            assert rounding < 0.03, f"bf16 itself is off by {rounding}; one rounding is 2**-9"
            assert frobenius(got["grads"][step], want["grads"][step]) <= 2 * rounding
            assert frobenius(got["values"][step], want["values"][step]) <= 2**-8  # one rounding of the parameter
            assert got["loss"][step] == pytest.approx(want["loss"][step], abs=2**-8)  # near 4.6, logits of size 1
            assert got["norm"][step] == pytest.approx(want["norm"][step], rel=rounding)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [pytest.param(layout, marks=two_gpus) for layout in LAYOUTS])
def test_two_gpus_equal_one(nccl: Pool, layout: str, precision: str) -> None:
    {"fp32": check_fp32, "bf16": check_bf16}[precision](nccl, LAYOUTS[layout])


FP8 = Experiment(
    method=METHOD,
    model={"preset": "tiny", "num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256},
    precision="bf16",
    steps=2,
)


def check_fp8(pool: Pool, layout: Layout) -> None:
    """Roundings that fall the other way are a fraction of what storing and multiplying in FP8 changes itself."""
    stored = replace(FP8, storage=StorageFormat("fp8"))
    (got,) = pool.run(2, train_exactly, experiments=[replace(stored, layout=layout)])[0]
    whole, exact = pool.run(1, train_exactly, experiments=[stored, FP8])[0]
    assert got["complaints"] == []
    assert got["loss"][0] == pytest.approx(whole["loss"][0], abs=2**-8)
    own = frobenius(whole["grads"][0], exact["grads"][0])
    assert own > 0.01, "the storage makes a difference at all"
    assert frobenius(got["grads"][0], whole["grads"][0]) < 0.5 * own


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=two_gpus) for layout in ("tp2", "tp2-sp", "pp2")])
def test_fp8_on_two_gpus_equals_one(nccl: Pool, layout: str) -> None:
    check_fp8(nccl, LAYOUTS[layout])


@pytest.mark.slow  # `test_oracle` compares the same over gloo, in every run
def test_rehearsal_of_the_comparison(pool: Pool) -> None:
    check_fp8(pool, LAYOUTS["tp2-sp"])
    check_fp32(pool, LAYOUTS["tp2-sp"])
    check_bf16(pool, LAYOUTS["tp2-sp"])


@dataclass(frozen=True)
class Slice:
    """A few layers of a wide model, adapted on q and v at rank 4."""

    hidden_size: int
    heads: int
    sequence_length: int
    vocabulary: int
    layers: int = 2
    micro_batches: int = 4
    warm_up: int = 3
    timed: int = 10


GPT3 = Slice(12288, 96, 2048, 50257)  # 12288 wide, 96 heads of 128: 175B's own numbers, two layers of its 96
TINY = Slice(64, 4, 32, 300, micro_batches=2, warm_up=2, timed=2)


def train_slice(size: Slice, layout: Layout, precision: str) -> dict[str, Any]:
    """Train on one repeated batch; losses, speed, and memory as the allocator counts it (zero on a CPU)."""
    ranks = build_mesh(layout, seed=1, timeout_minutes=2)
    cuda = ranks.device.type == "cuda"
    if cuda:  # the process may have run other jobs
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    left_over = torch.cuda.memory_allocated() if cuda else 0
    section = ModelSection(
        num_layers=size.layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.heads,
        max_position_embeddings=size.sequence_length,
    )
    shape = resolve_shape(section, tokenizer_vocab_size=size.vocabulary)
    method = choose_method(MethodSection(targets={"q": 4, "v": 4}), num_layers=size.layers)
    chunks = build(shape, method, layout, BuildOptions(precision))
    initialise_base(chunks, seed=3, num_layers=size.layers)
    ddp = wrap_ddp(chunks, sharding="none", precision=precision)
    optimizer = choose_optimizer(ddp, OptimizerSection(lr=1e-3), precision=precision)
    optimizer.refresh_master()
    weights = [p for chunk in chunks for p in chunk.parameters()]
    report: dict[str, Any] = {
        "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
        "trained": sum(p.numel() for p in weights if p.requires_grad),
        "bytes_before": torch.cuda.memory_allocated() - left_over if cuda else 0,
        "losses": [],
    }
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, size.vocabulary, (1, size.sequence_length + 1), generator=generator)
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(1, size.sequence_length),
        "position_ids": torch.arange(size.sequence_length)[None],
        "attention_mask": None,
        "first_sample": 0,
    }
    seconds = 0.0
    for step in range(size.warm_up + size.timed):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = run_microbatches(ddp, [batch] * size.micro_batches)
        report["losses"].append(loss.mean)
        norm = optimizer.step(loss.tokens)
        if cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start if step >= size.warm_up else 0.0
        assert math.isfinite(norm)
        assert norm > 0
    data_size = mpu.get_data_parallel_world_size()
    counted = size.timed * size.micro_batches * size.sequence_length * data_size
    report["tokens_per_second"] = counted / seconds
    report["peak_bytes"] = torch.cuda.max_memory_allocated() - left_over if cuda else 0
    report["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    report["versions"] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return report


def check_slice(report: dict[str, Any], size: Slice) -> None:
    losses = report["losses"]
    # Random weights know nothing: logits of variance 0.02^2 h (tied head on a normalised state), so the mean loss is
    # log V plus half that variance.
    expected = math.log(size.vocabulary) + 0.02**2 * size.hidden_size / 2
    assert losses[0] == pytest.approx(expected, rel=0.05)
    assert losses[-1] < losses[0], "one batch over and over is learnt"
    assert report["tokens_per_second"] > 0


def show(title: str, report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{title}: {json.dumps(report)}")


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=one_gpu)])
def test_a_step_at_gpt3_width(nccl: Pool, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = nccl.run(1, train_slice, size=GPT3, layout=Layout(), precision=precision)[0]
    show("GPT-3 slice on one GPU", report, capsys)
    check_slice(report, GPT3)
    assert report["trained"] == 2 * 2 * GPT3.layers * GPT3.hidden_size * 4
    # Beside the base's weights: fp32 gradient, master and moments of A and B (16 bytes each), and small buffers.
    extra = report["bytes_before"] - report["weight_bytes"]
    assert extra < 20 * report["trained"] + 64 * 2**20, "the frozen base costs more than its weights"
    assert report["peak_bytes"] < 40 * 2**30


@pytest.mark.parametrize("layout", [pytest.param(name, marks=two_gpus) for name in ("tp2", "tp2-sp", "pp2")])
def test_two_gpus_at_gpt3_width(nccl: Pool, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = nccl.run(1, train_slice, size=GPT3, layout=Layout(), precision="bf16")[0]
    reports = nccl.run(2, train_slice, size=GPT3, layout=LAYOUTS[layout], precision="bf16")
    show(f"GPT-3 slice on two GPUs, {layout}", reports, capsys)
    for report in reports:
        check_slice(report, GPT3)
        assert report["losses"][0] == pytest.approx(whole["losses"][0], rel=2**-8)  # bf16's rounding of a logit


def test_rehearsal_of_the_slice(pool: Pool) -> None:
    whole = pool.run(1, train_slice, size=TINY, layout=Layout(), precision="fp32")[0]
    check_slice(whole, TINY)
    assert whole["trained"] == 2 * 2 * TINY.layers * TINY.hidden_size * 4
    for layout in ("tp2-sp", "pp2"):
        for report in pool.run(2, train_slice, size=TINY, layout=LAYOUTS[layout], precision="fp32"):
            assert report["losses"] == pytest.approx(whole["losses"], rel=1e-5)
