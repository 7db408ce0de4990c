# SPDX-License-Identifier: Apache-2.0
"""FP8 models whose norms leave codes to the products that read them train, to the bit, as those that quantise anew.

On a CPU, where no kernel leaves any, the norms of the first are made to leave what quantising gives.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lora_megatron.layers import norm, rebuilt
from lora_megatron.layers.norm import NEITHER
from lora_megatron.layers.storage import fp8
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.left_codes import Quantised, leave, take
from lora_megatron.model import spec
from lora_megatron.parallel.groups import Layout
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin

STEPS = ("_LayerNormStep", "_RMSNormStep")


@contextlib.contextmanager
def left_on_a_cpu(count: Counter[str]) -> Iterator[None]:
    """What norms that may leave codes make, counted."""

    def left(kind: str, y: Tensor) -> Tensor:
        count[f"{kind} left"] += 1
        leave(y, fp8.quantise_tokens(y.detach().flatten(0, -2).clone(), factor=None, group=None))
        return y

    def leaving(original: Any) -> Any:
        def value(self: Any, x: Tensor, *parameters: Tensor | None) -> Tensor:
            y: Tensor = original(self, x, *parameters)
            return left("output", y) if self.in_fp8.output and not torch.is_grad_enabled() else y

        return value

    backward = rebuilt._RebuiltBesideResidual.backward

    def gradient(ctx: Any, *grads: Tensor | None) -> Any:
        _, grad, *rest = backward(ctx, *grads)
        if ctx.step.in_fp8.gradient and None not in grads:
            left("gradient", grad)
        return None, grad, *rest

    with contextlib.ExitStack() as patches:
        for name in STEPS:
            step = getattr(norm, name)
            patches.enter_context(mock.patch.object(step, "value", leaving(step.value)))
        patches.enter_context(mock.patch.object(rebuilt._RebuiltBesideResidual, "backward", staticmethod(gradient)))
        yield


def train_both(experiment: Experiment, wrong: bool = False) -> tuple[Record | None, Record | None, Counter[str]]:
    """With codes that are left, and without; and how many were left and taken, in evaluations and steps.

    wrong: with other codes than those of what is read.
    """
    if torch.cuda.is_available():  # other attention adds up its gradients in any order
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    count = Counter[str]()

    def noted(x: Tensor) -> Quantised | None:
        found = take(x)
        count["taken"] += found is not None
        return found if found is None or not wrong else found._replace(scale=found.scale * 1.1)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(fp8, "take", noted))
        if not torch.cuda.is_available():
            patches.enter_context(left_on_a_cpu(count))
        ours = train_twin(experiment)
    with mock.patch.object(spec, "ReadInFp8", return_value=NEITHER):
        return ours, train_twin(experiment), count


LAYERS = 3
WIDE = {"num_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4}
GPT = Experiment(model={"preset": "tiny", **WIDE}, steps=2, storage=StorageFormat("fp8"))
LLAMA = replace(GPT, model={"preset": "tiny-llama", **WIDE})
MODELS = {
    "gpt": GPT,
    "llama": LLAMA,
    "bf16": replace(GPT, precision="bf16"),
    "adapters drop out": replace(GPT, dropout=0.3),
    "nf4 for fp8": replace(GPT, storage=StorageFormat("nf4", "fp8")),
    "recomputed": replace(LLAMA, recompute="full"),
    "two recomputed": replace(GPT, recompute="full", recompute_layers=2),
    "recomputed together": replace(GPT, recompute="full", recompute_unit=LAYERS),
    "recomputed MLPs": replace(GPT, recompute="selective", recompute_modules=("core_attn", "mlp")),
    "no adapters in rows": replace(GPT, method={"targets": {"q": 4, "fc1": 2}}),
}


# Times that the layers of a chunk read what their norms leave, a microbatch: in a forward pass fc1 and qkv; in a
# backward one proj and fc2, but for the last, behind which is no layer's norm. What a recomputation makes again is read
# again; but of what a layer that is rebuilt by itself hands to the one before, nobody leaves any.
FORWARD = 2
AGAIN = {"recomputed": 2 * LAYERS, "two recomputed": 4, "recomputed together": 2 * LAYERS, "recomputed MLPs": LAYERS}
ANEW = {"recomputed": LAYERS - 1, "two recomputed": 1}


def times(experiment: Experiment, layers: int, name: str) -> int:
    trained = experiment.steps * experiment.global_batch_size
    backward = 2 * layers - 1 - ANEW.get(name, 0)
    return FORWARD * layers * (experiment.global_batch_size + trained) + trained * (AGAIN.get(name, 0) + backward)


def same(ours: Record, theirs: Record) -> bool:
    values = zip(ours["grads"] + ours["values"], theirs["grads"] + theirs["values"], strict=True)
    equal = all(
        list(got) == list(want) and all(torch.equal(got[one], want[one]) for one in want) for got, want in values
    )
    return equal and all(ours[kind] == theirs[kind] for kind in ("eval", "loss", "norm"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was_without(pool: Pool, name: str) -> None:
    ours, theirs, count = pool.run(1, train_both, experiment=MODELS[name])[0]
    assert same(ours, theirs)
    assert count["taken"] == times(MODELS[name], LAYERS, name)
    assert count["output left"] + count["gradient left"] == count["taken"], "none for nobody"


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)], ids=str)
def test_a_rank_is_what_it_was_without(pool: Pool, layout: Layout) -> None:
    """Tokens of all ranks' parts of a sequence are quantised where they are."""
    experiment = replace(GPT, layout=layout, model={**GPT.model, "num_layers": 4})
    (ours, theirs, count), other = pool.run(2, train_both, experiment=experiment)
    assert same(ours, theirs)
    assert count["taken"] == other[2]["taken"] == times(experiment, 4 // layout.pipeline, "")


def test_a_model_of_wrong_codes_is_another(pool: Pool) -> None:
    ours, theirs, _ = pool.run(1, train_both, experiment=GPT, wrong=True)[0]
    assert not same(ours, theirs)


BIASES, PARALLEL = {"name": "bitfit"}, {**GPT.model, "position": "rope", "parallel_residual": True}
NOTHING = {
    "not stored": replace(GPT, storage=None),
    "products in bf16": replace(GPT, storage=StorageFormat("nf4")),
    "all trained": replace(GPT, method={"name": "full"}, storage=None),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nobody_multiplies_in_fp8_none_are_left(pool: Pool, name: str) -> None:
    _, _, count = pool.run(1, train_both, experiment=NOTHING[name])[0]
    assert not count


@pytest.mark.parametrize("name", ["biases", "branches side by side", "the last layers trained"])
def test_where_some_do_others_are_not_asked(pool: Pool, name: str) -> None:
    """Of parallel branches autograd adds three gradients; layers that train read what they are given."""
    experiment = {
        "biases": replace(GPT, method=BIASES),
        "branches side by side": replace(GPT, model=PARALLEL),
        "the last layers trained": replace(GPT, method={"name": "ft_top2"}),
    }[name]
    ours, theirs, count = pool.run(1, train_both, experiment=experiment)[0]
    assert same(ours, theirs)
    assert count["taken"] == count["output left"] + count["gradient left"] > 0
    if name == "branches side by side":
        assert not count["gradient left"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Pool]:
    pool = Pool(1, backend="nccl")
    yield pool
    pool.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernels are Triton's")
@pytest.mark.parametrize("name", ["bf16", "llama", "adapters drop out", "nf4 for fp8", "recomputed MLPs"])
def test_a_model_is_what_it_was_by_kernel(gpu: Pool, name: str) -> None:
    experiment = replace(MODELS[name], precision="bf16")
    ours, theirs, count = gpu.run(1, train_both, experiment=experiment)[0]
    assert same(ours, theirs)
    assert count["taken"] == times(experiment, LAYERS, name)
    wrong, theirs, _ = gpu.run(1, train_both, experiment=experiment, wrong=True)[0]
    assert not same(wrong, theirs)
