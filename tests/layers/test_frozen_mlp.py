# SPDX-License-Identifier: Apache-2.0
"""A frozen MLP as one function gives what its layers give one after the other, adapters included.

Of FP8 weights, in fp32, the codes are made of the same numbers either way, so nothing but the order of a few sums may
differ. And fc1's output made again in the backward pass is what was not kept: nothing differs at all, in any format.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from lora_megatron.layers import adapted_activation, frozen_mlp, mlp
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.parallel.groups import Layout
from tests.comparison import Mismatch, compare, frobenius
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin, train_twins

WIDE = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
GPT = Experiment(model={"preset": "tiny", **WIDE}, storage=StorageFormat("fp8"), steps=1)
LLAMA = replace(GPT, model={"preset": "tiny-llama", **WIDE}, storage=StorageFormat("nf4", "fp8"))
FC2 = {"targets": {"fc2": 3}}
EXPERIMENTS = {
    "gpt": GPT,
    "llama": LLAMA,
    "dropout": replace(GPT, dropout=0.3),
    "q alone": replace(GPT, method={"targets": {"q": 2}}),
    "fc1 alone": replace(GPT, method={"targets": {"fc1": 2}}),  # so layer 0's input needs no gradient
    "fc2 alone": replace(LLAMA, method=FC2),
    "up alone": replace(LLAMA, method={"targets": {"up": 2}}),
    "recomputed": replace(LLAMA, recompute="full"),
}
CUT = ("gpt", "llama", "dropout")
LAYOUTS = {
    "one": (Layout(), tuple(EXPERIMENTS)),
    "tp2": (Layout(tensor=2), CUT),
    "tp2-sp": (Layout(tensor=2, sequence=True), CUT),
}
CASES = [(layout, name) for layout, (_, names) in LAYOUTS.items() for name in names]
_records: dict[str, dict[str, tuple[Record, Record]]] = {}


def train_both(experiments: list[Experiment]) -> list[tuple[Record | None, Record | None]]:
    """Each run as one function, and layer by layer."""
    return [(train_twin(experiment), _layer_by_layer(experiment)) for experiment in experiments]


def _layer_by_layer(experiment: Experiment) -> Record | None:
    with (
        mock.patch.object(mlp, "_gains_by_one_function", return_value=False) as asked,
        mock.patch.object(mlp, "frozen_mlp", side_effect=AssertionError("not this way")),
    ):
        record = train_twin(experiment)
    assert asked.called
    return record


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_one_function_is_its_layers_one_after_the_other(pool: Pool, layout: str, name: str) -> None:
    if layout not in _records:
        cut, names = LAYOUTS[layout]
        experiments = [replace(EXPERIMENTS[one], layout=cut) for one in names]
        _records[layout] = dict(zip(names, pool.run(cut.tensor, train_both, experiments=experiments)[0], strict=True))
    together, apart = _records[layout][name]
    assert compare(together, apart, tolerance=1e-5) > 0


on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: Triton's kernels are compared, without which the others do"
)
MLP: dict[str, Any] = {"recompute": "selective", "recompute_modules": ("mlp",)}
NF4 = StorageFormat("nf4")
KEPT = {
    "whole": replace(GPT, storage=None, steps=2),
    "whole, bf16": replace(LLAMA, storage=None, precision="bf16", steps=2),
    "nf4": replace(LLAMA, storage=NF4, steps=2),
    "nf4, bf16, dropout": replace(GPT, storage=NF4, precision="bf16", dropout=0.3),
    "fp8": replace(GPT, dropout=0.3, steps=2),
    "nf4 in fp8, bf16": replace(LLAMA, precision="bf16", steps=2),
    "q alone": replace(LLAMA, storage=None, method={"targets": {"q": 2}}),
    "fc1 alone": replace(GPT, storage=None, method={"targets": {"fc1": 2}}),
    "fc2 alone": replace(GPT, method=FC2),
    "fc2 alone, whole": replace(LLAMA, storage=None, method=FC2),
}


def check_bits(pool: Pool, cut: Layout, experiments: dict[str, Experiment]) -> None:
    """Losses, gradients and parameters of every step."""
    kept = [replace(experiment, layout=cut) for experiment in experiments.values()]
    found = pool.run(cut.tensor, train_twins, experiments=[*kept, *(replace(one, **MLP) for one in kept)])[0]
    for name, record, again in zip(experiments, found, found[len(kept) :], strict=False):
        assert again["loss"] == record["loss"], name
        for kind in ("grads", "values"):
            for want, got in zip(record[kind], again[kind], strict=True):
                assert [one for one in want if not torch.equal(got[one], want[one])] == [], (name, kind)


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(Layout(), id="one"),
        pytest.param(Layout(tensor=2), id="tp2", marks=pytest.mark.slow),
        pytest.param(Layout(tensor=2, sequence=True), id="sp"),
    ],
)
def test_what_is_made_again_is_what_was_kept(pool: Pool, cut: Layout) -> None:
    check_bits(pool, cut, KEPT)


@pytest.mark.gpu
@on_gpu
def test_it_is_on_a_gpu() -> None:
    """Of FP8 weights, whose MLP is the same function either way."""
    pool = Pool(1, backend="nccl")
    try:
        check_bits(pool, Layout(), {name: KEPT[name] for name in ("fp8", "nf4 in fp8, bf16", "fc2 alone")})
    finally:
        pool.close()


# On a GPU the adapters are inside the activation's passes. Scale alpha / r near 1, as in test_oracle_gpu.
ADAPTERS = {"q": 4, "o": 3, "fc1": 2, "fc2": 5}
ON_GPU = {
    "gpt": replace(GPT, storage=None, method={"targets": ADAPTERS, "alpha": 2}),
    "llama": replace(LLAMA, storage=None, method={"targets": ADAPTERS, "alpha": 2}),
    "fc1 alone": replace(GPT, storage=None, method={"targets": {"fc1": 2}, "alpha": 2}),
    "fc2 alone": replace(LLAMA, storage=None, method={"targets": {"fc2": 3}, "alpha": 2}),
    "dropout": replace(GPT, storage=None, method={"targets": ADAPTERS, "alpha": 2}, dropout=0.3),
}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "nf4": {"precision": "bf16", "storage": NF4},
    "fp8": {"precision": "bf16", "storage": StorageFormat("fp8")},
}


def train_both_twice(experiment: Experiment) -> list[Record | None]:
    """As one function, again, layer by layer; and layer by layer in fp32, of weights as they are."""
    torch.set_float32_matmul_precision("highest")
    exact = replace(experiment, storage=None, precision="fp32")
    return [train_twin(experiment), train_twin(experiment), _layer_by_layer(experiment), _layer_by_layer(exact)]


@pytest.mark.gpu
@on_gpu
def test_adapters_inside_the_passes_are_layers_one_after_the_other() -> None:
    """In fp32 but for the order of sums; elsewhere as far as both are from fp32, and the one function no further from
    it than its layers. And to the bit the same when it is done again."""
    pool = Pool(1, backend="nccl")
    try:
        for name, kind in product(ON_GPU, FORMATS):
            experiment = replace(ON_GPU[name], **FORMATS[kind])
            together, again, apart, exact = pool.run(1, train_both_twice, experiment=experiment)[0]
            for one in ("grads", "values"):
                got, same = together[one][0], again[one][0]
                assert [key for key in got if not torch.equal(got[key], same[key])] == [], (name, kind)
            if kind == "fp32":
                assert compare(together, apart, tolerance=1e-4) > 0
                continue
            off, own = (frobenius(record["grads"][0], exact["grads"][0]) for record in (together, apart))
            between = frobenius(together["grads"][0], apart["grads"][0])
            print(f"{name}, {kind}: from fp32 {off:.2e}, layer by layer {own:.2e}; between them {between:.2e}")
            assert off < 1.2 * own, (name, kind)
            assert between < 2 * own, (name, kind)
    finally:
        pool.close()


def train_without(what: str) -> tuple[Record | None, Record | None]:
    """`gpt` in fp32, whose backward pass knows nothing of one layer's adapter; and as it is."""
    from lora_megatron.layers import mlp_adapters  # needs Triton

    original: Any = mlp_adapters.gradients

    def broken(z: Any, bias: Any, update: Any, a: Any, du2: Any, *rest: Any, **flags: Any) -> Any:
        if what == "fc1":
            update = replace(update, scales=tuple(0.0 for _ in update.scales))
        return original(z, bias, update, a, 0 * du2 if what == "fc2" else du2, *rest, **flags)

    with mock.patch.object(mlp_adapters, "gradients", broken):
        record = train_twin(ON_GPU["gpt"])
    return record, _layer_by_layer(ON_GPU["gpt"])


@pytest.mark.gpu
@on_gpu
def test_a_backward_pass_without_an_adapter_shows() -> None:
    pool = Pool(1, backend="nccl")
    try:
        for what in ("fc1", "fc2"):
            broken, apart = pool.run(1, train_without, what=what)[0]
            assert broken["loss"] == pytest.approx(apart["loss"], rel=1e-5), "the forward pass is as it was"
            with pytest.raises(Mismatch):
                compare(broken, apart, tolerance=1e-4)
    finally:
        pool.close()


def train_broken(fault: str) -> tuple[Record | None, Record | None]:
    """`gpt` as one function that has a fault, and layer by layer."""
    original: Any = getattr(adapted_activation if fault == "add_input_gradient" else frozen_mlp, fault)

    def unscaled(*args: Any, **kwargs: Any) -> Any:
        if fault == "Update":
            return original(args[0], tuple(2 * scale for scale in args[1]), *args[2:])
        return args[0]  # du A is never added

    with mock.patch.object(adapted_activation if fault == "add_input_gradient" else frozen_mlp, fault, unscaled):
        broken = train_twin(GPT)
    return broken, _layer_by_layer(GPT)


@pytest.mark.parametrize("fault", ["Update", "add_input_gradient"])
def test_a_fault_in_the_one_function_shows(pool: Pool, fault: str) -> None:
    """So the runs above do take it, with adapters on both of its layers."""
    with pytest.raises(Mismatch):
        compare(*pool.run(1, train_broken, fault=fault)[0], tolerance=1e-5)


def train_from_another_x() -> tuple[Record | None, Record | None]:
    """`gpt` with fc1's output made again from twice its input, and kept."""
    original: Any = mlp.frozen_mlp.__globals__["recipe_or_itself"]
    with mock.patch.dict(mlp.frozen_mlp.__globals__, {"recipe_or_itself": lambda x: original(2 * x)}):
        broken = train_twin(replace(GPT, **MLP))
    return broken, train_twin(GPT)


def test_what_is_made_of_another_input_shows(pool: Pool) -> None:
    """So the runs above do make it again; the forward pass knows nothing of it."""
    broken, kept = pool.run(1, train_from_another_x)[0]
    assert broken["loss"] == kept["loss"]
    with pytest.raises(Mismatch):
        compare(broken, kept, tolerance=1e-5)
