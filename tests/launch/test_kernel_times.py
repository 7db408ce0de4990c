# SPDX-License-Identifier: Apache-2.0
"""launch/kernel_times.py on kernels written by hand: kinds, sums of a step, what one more layer adds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from launch.kernel_times import COLLECTIVES, KINDS, KernelTime, kernel_times, kind_of, kinds_of, per_layer, short_name
from lora_megatron.bench.communication import Kernel

MILLI = 10**6
LAYERS = Path(__file__).resolve().parents[2] / "lora_megatron" / "layers"
INSIDE_OTHERS = {
    "_which",
    "chosen",
    "_columns",
    "_rows_of",
    "stacked",
    "_value_and_slope",
    "_loaded",
    "_outputs",
    "_sigmoid",
    "_sum_part",
    "store_quantised",
    "_u",
    "_b",
    "_fc1",
    "_total",
    "_exp",
    "_lanes",
    "_with_piece",
}
GEMM = "nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_TNT"


def kernel(name: str, start: int, stop: int) -> Kernel:
    """Milliseconds."""
    return Kernel(name, (start * MILLI, stop * MILLI))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("_add", "low-rank kernels"),
        ("_gradients", "low-rank kernels"),
        ("_add_rows", "low-rank kernels"),
        ("_add_residual", "low-rank kernels"),
        ("_sum", "low-rank kernels"),
        ("activate_and_project", "low-rank kernels"),
        ("adapted_gradients", "low-rank kernels"),
        ("add_input_product", "low-rank kernels"),
        ("normed_factor_gradients", "low-rank kernels"),
        ("_turn", "rotary positions"),
        ("_quantise_rows", "FP8 casts and transposes"),
        ("_quantise_held", "FP8 casts and transposes"),
        ("_transpose", "FP8 casts and transposes"),
        ("_unpack", "FP8 casts and transposes"),
        ("_loss_statistics", "loss"),
        ("_loss_gradient", "loss"),
        ("_norm", "norms and activations"),
        ("_norm_gradient", "norms and activations"),
        ("void at::native::(anonymous namespace)::GeluCUDAKernelImpl", "norms and activations"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<Adam>", "optimizer"),
        (GEMM, "products"),
        ("aten::mm", "products"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::elementwise_kernel<CUDAFunctor_add<float>>", "other"),
        ("void at::native::reduce_kernel<sum_functor>", "other"),
        ("all_reduce_like_nothing_of_nccl", "other"),
        ("aten::mmap", "other"),
    ],
)
def test_what_kind_a_kernel_is(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_kernel_of_ours_has_a_kind() -> None:
    """One that is added, or named anew, does not end among the others."""
    found = {
        node.name
        for path in LAYERS.rglob("*kernels.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
    }
    assert {"_add", "_sum", "_turn"} < found
    assert sorted(name for name in found - INSIDE_OTHERS if kind_of(name) == "other") == []
    assert COLLECTIVES not in dict(KINDS)


def test_a_step_is_the_mean_of_the_steps() -> None:
    kernels = [
        kernel(GEMM, 0, 4),
        kernel("_add", 2, 3),
        kernel(GEMM, 10, 16),
        kernel("_add", 16, 17),
        kernel("_add", 20, 22),
    ]
    gemm, add = kernel_times(kernels, steps=2)
    assert (gemm.name, gemm.kind, gemm.launches, gemm.seconds) == (GEMM, "products", 1.0, pytest.approx(5e-3))
    assert (add.name, add.kind, add.launches, add.seconds) == ("_add", "low-rank kernels", 1.5, pytest.approx(2e-3))
    assert kernel_times([], steps=2) == []


def test_one_more_layer_is_the_difference_by_layer() -> None:
    """What both slices do alike cancels out, and a kernel that only one of them runs is not forgotten."""
    small = [KernelTime("loss", "other", 1, 9.0), KernelTime("a", "other", 4, 2.0), KernelTime("b", "other", 1, 0.5)]
    large = [KernelTime("loss", "other", 1, 9.0), KernelTime("a", "other", 12, 5.0), KernelTime("_add", "x", 2, 8.0)]
    assert per_layer(small, large, layers=2) == [
        KernelTime("_add", "low-rank kernels", 1.0, 4.0),
        KernelTime("a", "other", 4.0, 1.5),
        KernelTime("loss", "other", 0.0, 0.0),
        KernelTime("b", "other", -0.5, -0.25),
    ]


def test_kinds_are_the_sums_of_their_kernels() -> None:
    times = [KernelTime("a", "x", 1, 2.0), KernelTime("b", "y", 2, 3.0), KernelTime("c", "x", 3, 4.0)]
    assert list(kinds_of(times).items()) == [("x", (4.0, 6.0)), ("y", (2.0, 3.0))]


def test_a_long_name_is_cut() -> None:
    assert short_name("void at::native::(anonymous namespace)::copy<float>") == "copy<float>"
    assert short_name("x" * 100, length=10) == "xxxxxxx..."
    assert short_name("x" * 10, length=10) == "x" * 10
