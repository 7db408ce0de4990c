# SPDX-License-Identifier: Apache-2.0
"""What a bench computes from measured numbers: lines through slices, rates of products, spreads, ratios, headlines."""

from __future__ import annotations

import math

import pytest
import torch

from lora_megatron.bench import tables
from lora_megatron.bench.gemm import (
    DGRAD,
    FORWARD,
    FROZEN_PRODUCTS,
    TRAINED_PRODUCTS,
    WGRAD,
    Linear,
    Product,
    ceiling,
    linears_of,
    mean_of,
    measure_products,
)
from lora_megatron.bench.results import Known, Row, Scale, extrapolate, headline, ratios
from lora_megatron.bench.slices import Line, check_layers, most_that_fit, two_sizes
from lora_megatron.bench.timing import spread
from lora_megatron.config import ModelSection, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.model.presets import resolve_shape

KNOWN, SCALE = Known([], model_flops=6e12, hardware_flops=8e12), Scale(tokens=4096, ranks=2)


def seconds_of(median: float) -> dict[str, float]:
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median}


def slice_row(layers: int, *, method: str = "lora") -> Row:
    """A slice that keeps t(n) = 0.3 + 0.05 n, a fifth of it in the optimizer, and 10 + 2 n bytes."""
    seconds = 0.3 + 0.05 * layers
    return {
        "method": method,
        "layers": layers,
        "extrapolated_from": None,
        "out_of_memory": None,
        "step_seconds": seconds_of(seconds),
        "forward_backward_seconds": seconds_of(0.8 * seconds),
        "optimizer_seconds": seconds_of(0.2 * seconds),
        "peak_bytes": 10 + 2 * layers,
        "trainable_parameters": 7 * layers,
        "total_parameters": 1000 + 90 * layers,
    }


def test_two_slices_find_the_law_they_keep() -> None:
    row = extrapolate(slice_row(2), slice_row(5), KNOWN, SCALE, layers=96, ceiling=2e12)
    assert row is not None
    assert row["step_seconds"]["median"] == pytest.approx(0.3 + 0.05 * 96)
    assert row["forward_backward_seconds"]["median"] == pytest.approx(0.8 * 5.1)
    assert row["optimizer_seconds"]["median"] == pytest.approx(0.2 * 5.1)
    assert (row["peak_bytes"], row["trainable_parameters"], row["total_parameters"]) == (202, 672, 9640)
    assert row["extrapolated_from"] == [2, 5]
    assert row["tokens_per_second_per_rank"] == pytest.approx(4096 / 5.1 / 2)
    assert row["model_flops_per_second_per_rank"] == pytest.approx(6e12 / 5.1 / 2)
    assert row["hardware_flops_per_second_per_rank"] == pytest.approx(8e12 / 5.1 / 2)
    assert row["share_of_ceiling"] == pytest.approx(8 / 5.1 / 2 / 2)


def test_the_range_of_an_extrapolation_is_made_of_the_ends_of_both_slices() -> None:
    row = extrapolate(slice_row(2), slice_row(4), KNOWN, SCALE, layers=8, ceiling=None)
    assert row is not None
    # t(2) = 0.4 +- 0.04 and t(4) = 0.5 +- 0.05: one slope is (0.45 - 0.44) / 2, the other (0.55 - 0.36) / 2.
    assert row["step_seconds"]["low"] == pytest.approx(0.45 + 4 * 0.005)
    assert row["step_seconds"]["high"] == pytest.approx(0.55 + 4 * 0.095)
    assert row["share_of_ceiling"] is None


def test_slices_that_do_not_differ_say_nothing_and_a_range_never_falls_below_a_slice() -> None:
    small, large = slice_row(2), slice_row(4)
    large["step_seconds"] = small["step_seconds"]
    assert extrapolate(small, large, KNOWN, SCALE, layers=8, ceiling=None) is None
    large["step_seconds"] = seconds_of(0.401)
    row = extrapolate(small, large, KNOWN, SCALE, layers=8, ceiling=None)
    assert row is not None
    assert row["step_seconds"]["low"] == pytest.approx(0.9 * 0.401)


def test_a_line() -> None:
    line = Line.through((2, 7.0), (5, 1.0))
    assert (line.start, line.slope, line.at(0), line.at(6)) == (11.0, -2.0, 11.0, -1.0)


@pytest.mark.parametrize("limit", range(0, 97, 7))
@pytest.mark.parametrize("unit", [1, 4])
def test_the_most_layers_that_fit_are_found(limit: int, unit: int) -> None:
    expected = limit // unit * unit or None
    assert most_that_fit(lambda layers: layers <= limit, all_layers=96, unit=unit) == expected


@pytest.mark.parametrize(
    ("layers", "room", "unit", "expected"),
    [
        (1, 1, 1, [1]),
        (2, 2, 1, [1, 2]),
        (5, 9, 1, [2, 5]),
        (8, 8, 4, [4, 8]),
        (12, 12, 4, [4, 12]),
        (4, 4, 4, [4]),
        (1, 3, 1, [1, 3]),
        (1, 96, 1, [1, 4]),
        (4, 96, 4, [4, 16]),
    ],
)
def test_the_second_slice_is_about_half_or_larger(layers: int, room: int, unit: int, expected: list[int]) -> None:
    assert two_sizes(layers, room, unit=unit) == expected


def product(linear: Linear, kind: str, seconds: float) -> Product:
    return Product(linear, kind, m=10, seconds=seconds)


def test_the_ceiling_weighs_products_by_their_time_in_the_model() -> None:
    layer, output = Linear("fc1", 30, 20), Linear("output", 50, 20, in_every_layer=False)
    products = [
        product(layer, FORWARD, 1.0),
        product(layer, DGRAD, 2.0),
        product(layer, WGRAD, 4.0),
        product(output, FORWARD, 8.0),
        product(output, DGRAD, 16.0),
        product(output, WGRAD, 32.0),
    ]
    each, last = 2 * 10 * 20 * 30, 2 * 10 * 20 * 50
    assert ceiling(products, FROZEN_PRODUCTS, layers=3) == pytest.approx((6 * each + 2 * last) / (9 + 24))
    assert ceiling(products, TRAINED_PRODUCTS, layers=3) == pytest.approx((9 * each + 3 * last) / (21 + 56))
    assert ceiling([], FROZEN_PRODUCTS, layers=3) is None
    later = [product(layer, FORWARD, 3.0)]
    assert [p.seconds for p in mean_of(products[:2], later)] == [2.0, 2.0]


@pytest.mark.parametrize("preset", ["gpt3-125m", "llama2-70b"])
@pytest.mark.parametrize("tensor", [1, 4])
def test_the_linears_of_all_ranks_are_the_linear_weights_of_the_model(preset: str, tensor: int) -> None:
    shape = resolve_shape(ModelSection(preset=preset), tokenizer_vocab_size=50257)
    linears = linears_of(shape, tensor=tensor)
    in_layers = sum(x.out_features * x.in_features for x in linears if x.in_every_layer) * tensor
    assert in_layers == sum(math.prod(shape.projection(name)) for name in shape.projections)
    (output,) = [x for x in linears if not x.in_every_layer]
    assert output.out_features * tensor >= 50257 > output.out_features * tensor - 128 * tensor
    assert output.in_features == shape.hidden_size


def test_products_are_timed_at_their_own_sizes() -> None:
    small, large = Linear("small", 16, 16), Linear("large", 512, 512)
    products, without_room = measure_products([small, large], m=64, precision="fp32", seconds=0.02)
    assert without_room == []
    assert [(p.linear.name, p.kind) for p in products] == [(n, k) for n in ("small", "large") for k in TRAINED_PRODUCTS]
    by_case = {(p.linear.name, p.kind): p for p in products}
    for kind in TRAINED_PRODUCTS:
        assert by_case["large", kind].flops == 2 * 64 * 512 * 512
        assert 0 < by_case["small", kind].seconds < by_case["large", kind].seconds


def test_a_product_without_room_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    randn = torch.randn

    def no_room_above(size: tuple[int, ...], **options: object) -> torch.Tensor:
        if math.prod(size) > 64 * 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return randn(size, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "randn", no_room_above)
    products, without_room = measure_products(
        [Linear("small", 16, 16), Linear("large", 512, 512)], m=64, precision="fp32", seconds=0.001
    )
    assert without_room == ["large"]
    assert {p.linear.name for p in products} == {"small"}


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8)}
    assert spread([5.0]) == {"median": 5.0, "p10": 5.0, "p90": 5.0}


def test_ratios_compare_like_with_like() -> None:
    rows = [slice_row(n, method=m) for n in (2, 4) for m in ("lora", "full")]
    rows[2]["step_seconds"], rows[2]["peak_bytes"] = seconds_of(0.25), 9
    rows[3]["extrapolated_from"] = [1, 2]
    found = ratios(rows, "full")
    assert [(r["method"], r["to"], r["layers"]) for r in found] == [("lora", "full", 2), ("lora", "full", 4)]
    assert [r["speed"] for r in found] == [1.0, pytest.approx(2.0)]
    assert found[1]["peak_memory"] == pytest.approx(9 / 18)
    assert [r["extrapolated"] for r in found] == [False, True]
    rows[3] |= {"step_seconds": None, "out_of_memory": "out of memory"}
    assert [r["layers"] for r in ratios(rows, "full")] == [2]


def test_the_headline_has_every_method_at_the_same_size() -> None:
    rows = [slice_row(2), slice_row(2, method="full"), slice_row(96)]
    assert headline(rows, ["lora", "full"]) == rows[:2]
    rows.append(slice_row(96, method="full"))
    assert headline(rows, ["full", "lora"]) == [rows[3], rows[2]]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (3, "--layers 3: every stage and chunk of the pipeline gets the same number of layers, so choose"),
        (2, "--layers 2: 2 layers of each stage and chunk of the pipeline are recomputed together, so choose"),
    ],
)
def test_a_slice_that_cannot_be_cut_names_what_is_at_fault(layers: int, said: str) -> None:
    tree = {"model": {"preset": "tiny"}, "data": {"train": "x"}, "run": {"dir": "x"}}
    config = parse_config({**tree, "parallel": {"pipeline": 2}, "train": {"recompute": "full", "recompute_unit": 2}})
    with pytest.raises(ConfigError) as error:
        check_layers(layers, config, all_layers=8)
    assert str(error.value) == f"{said} a multiple of parallel.pipeline x virtual_pipeline x train.recompute_unit = 4"
    check_layers(4, config, all_layers=8)


@pytest.mark.parametrize(
    ("flops", "shown"), [(None, "-"), (4.31e10, "0.0431"), (6.4512e13, "64.5"), (7.734e14, "773"), (1.0688e15, "1,069")]
)
def test_rates_are_shown_in_teraflops(flops: float | None, shown: str) -> None:
    assert tables._tera(flops) == shown
