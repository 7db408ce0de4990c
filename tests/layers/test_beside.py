# SPDX-License-Identifier: Apache-2.0
"""What adapters have of each token goes beside the tokens: under sequence parallelism with an exchange, an adapted
layer starts no collective and waits for nobody where the frozen layer alone would not.

Processes of a CPU exchange through files (`shared_boxes`). That the results are right is `test_exchange`'s to show;
here it is that trainings notice if they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_megatron.layers import exchange
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.product import Product
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.comparison import Mismatch, compare
from tests.layers.shared_boxes import SharedBox, exchanging
from tests.pool import Pool
from tests.twin import Experiment, Record, build_chunks, train_twin, train_twins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="boxes that stand in for a GPU's")

SP2 = Layout(tensor=2, sequence=True)
ADAPTED = Experiment(layout=SP2, tp_comm_overlap=True, steps=1, model={"preset": "tiny", "num_layers": 2})
FROZEN = replace(ADAPTED, method={"targets": {"q": 1}, "layers": {"1": {"q": 0}}})
"""The last layer is."""
IN_FP8 = {
    "model": {"preset": "tiny", "num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256},
    "storage": StorageFormat("fp8"),
}
AGAIN: dict[str, Any] = {"recompute": "selective", "recompute_modules": ("mlp",)}


class Collectives(TorchDispatchMode):
    """Notes what torch.distributed is asked for within, barriers of boxes aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__ if func.namespace == "c10d" else "barrier"
        if name != "barrier":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def of_a_layer(experiments: Sequence[Experiment]) -> list[tuple[list[str], int]]:
    """Collectives and barriers of the last layer, forward and backward, for each experiment."""
    found = []
    with exchanging():
        build_mesh(SP2, seed=1, timeout_minutes=2)
        for experiment in experiments:
            (chunk,), _ = build_chunks(experiment)
            for named in named_parameters([chunk]):
                named.parameter.main_grad = torch.zeros(named.parameter.shape)
            layer, width = chunk.decoder.layers[-1], chunk.config.hidden_size
            x = torch.randn(8, 1, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
            exchange.forget_turns()
            before = SharedBox.barriers
            with Collectives() as asked:
                layer(hidden_states=x, attention_mask=None)[0].sum().backward()
            assert x.grad is not None
            found.append((asked.names, SharedBox.barriers - before))
    return found


def test_an_adapted_layer_starts_no_collective(pool: Pool) -> None:
    """Four gathers and four sums, of as many products: every one of them took another with it."""
    kinds: tuple[dict[str, Any], ...] = ({}, IN_FP8, AGAIN, {**IN_FP8, **AGAIN})
    pairs = [replace(one, **kind) for kind in kinds for one in (ADAPTED, FROZEN)]
    for found in pool.run(2, of_a_layer, experiments=pairs):
        assert found[::2] == found[1::2]
        assert [count for _, count in found][::2] == [9, 9, 11, 11]  # one before the first; two for z made again
        for (names, _), experiment in zip(found, pairs, strict=True):
            # Ranks agree on the scale of a token of which each has some of the values.
            assert names == (["allreduce_"] * 4 if experiment.storage else [])


def test_without_an_exchange_each_starts_its_own(pool: Pool) -> None:
    """So the count above does count."""
    plain = [replace(one, tp_comm_overlap=False) for one in (ADAPTED, FROZEN)]
    for adapted, frozen in pool.run(2, of_a_layer, experiments=plain):
        assert (len(adapted[0]), len(frozen[0])) == (16, 8)
        assert (adapted[1], frozen[1]) == (0, 0)


def box_sizes(experiment: Experiment) -> tuple[list[list[int]], int]:
    """What each box of a rank has been, and what is planned."""
    made: list[SharedBox] = []
    original: Any = SharedBox.__init__

    def noted(box: SharedBox, *args: Any, **named: Any) -> None:
        original(box, *args, **named)
        made.append(box)

    sizes: dict[int, list[int]] = {}
    holding: Any = SharedBox.holding

    def grow(box: SharedBox, size: int) -> bool:
        grown: bool = holding(box, size)
        kept = sizes.setdefault(made.index(box), [])
        if box.size not in kept:
            kept.append(box.size)
        return grown

    with exchanging(), mock.patch.object(SharedBox, "__init__", noted), mock.patch.object(SharedBox, "holding", grow):
        train_twin(experiment)
    return list(sizes.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 3])
def test_boxes_are_made_once_and_as_large_as_planned(pool: Pool, precision: str, rank: int) -> None:
    """Also where a layer with more adapters comes behind one with fewer."""
    method = {"targets": {"q": 1, "o": 2}, "layers": {"1": {"q": rank, "v": 4, "fc2": 5}}}
    if not rank:
        method = {"targets": {"o": 2}}
    experiment = replace(ADAPTED, method=method, precision=precision)
    tokens, width = experiment.sequence_length // 2, 64
    for sizes in pool.run(2, box_sizes, experiment=experiment):
        assert [len(each) for each in sizes] == [2, 2], "no more than the first, of a few bytes"
        itemsize = 2 if precision == "bf16" else 4
        planned = exchange.bytes_of(tokens, width, 2, itemsize, beside=rank + 4 if rank else 2)
        assert sum(each[-1] for each in sizes) == planned


def own_part_alone(
    self: exchange.Exchange, product: Product, parts: Any, beside: Tensor | None = None, factors: Any = ()
) -> Any:
    """A sum that leaves out what other ranks sent beside the rows."""
    output, extra = SOUND["sum_of_products"](self, product, parts, beside, factors)
    return output, extra if beside is None else beside.unflatten(0, (self.size, -1))[self.rank]


def own_rows_alone(
    self: exchange.Exchange, product: Product, parts: Any, beside: Tensor | None = None, on_own: Any = None
) -> Any:
    """A gather whose rows beside are this rank's over and over."""
    output, extra = SOUND["product_of_all"](self, product, parts, beside, on_own)
    return output, extra if beside is None else torch.cat([beside] * self.size)


def nothing_on_own_rows(
    self: exchange.Exchange, product: Product, parts: Any, beside: Tensor | None = None, on_own: Any = None
) -> Any:
    """A gather that leaves out what is to be done with this rank's rows meanwhile: their update."""
    return SOUND["product_of_all"](self, product, parts, beside)


def without_the_adapters_part(
    self: exchange.Exchange, product: Product, parts: Any, beside: Tensor | None = None, factors: Any = ()
) -> Any:
    """A sum to which du A is not added."""
    return SOUND["sum_of_products"](self, product, parts, beside)


SOUND: dict[str, Any] = {name: getattr(exchange.Exchange, name) for name in ("sum_of_products", "product_of_all")}
FAULTS = {"sum_of_products": own_part_alone, "product_of_all": own_rows_alone}
"""Of the exchange; and of whose pass."""
FORWARD = {"product_of_all": ("q", "fc1"), "sum_of_products": ("o", "fc2")}


def train_broken(fault: str, experiments: list[Experiment], *, how: Any = None) -> list[Record | None]:
    with exchanging(), mock.patch.object(exchange.Exchange, fault, how or FAULTS[fault]):
        return train_twins(experiments)


ONE_EACH = [replace(ADAPTED, method={"targets": {target: 2}}, **AGAIN) for target in ("q", "o", "fc1", "fc2")]
"""Adapted projections. In layer 0, no product needs the gradient of what they read, and u or du is exchanged alone."""


@pytest.fixture(scope="module")
def twins(pool: Pool) -> list[Record]:
    """Of one process."""
    whole = [replace(one, layout=Layout(), tp_comm_overlap=False) for one in ONE_EACH]
    found: list[Record] = pool.run(1, train_twins, experiments=whole)[0]
    return found


def train_soundly(experiments: list[Experiment]) -> list[Record | None]:
    with exchanging():
        return train_twins(experiments)


@pytest.mark.parametrize("overlap", [True, False], ids=["beside", "by collectives"])
def test_each_projection_alone_trains_as_in_one_process(pool: Pool, twins: list[Record], overlap: bool) -> None:
    experiments = [replace(one, tp_comm_overlap=overlap) for one in ONE_EACH]
    for record, twin in zip(pool.run(2, train_soundly, experiments=experiments)[0], twins, strict=True):
        assert compare(record, twin) > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_training_notices_what_a_gather_or_a_sum_leaves_out(pool: Pool, twins: list[Record], fault: str) -> None:
    """Of one pass or the other: forward the loss is another one, backward the gradient of A alone."""
    broken = pool.run(2, train_broken, fault=fault, experiments=ONE_EACH)[0]
    for experiment, record, twin in zip(ONE_EACH, broken, twins, strict=True):
        (target,) = experiment.method["targets"]
        forward = target in FORWARD[fault]
        with pytest.raises(Mismatch, match="^eval" if forward else "^norm of step 0"):
            compare(record, twin)


def test_training_notices_a_gradient_without_what_goes_through_an_adapter(pool: Pool) -> None:
    """Of what the second layer's adapters read: the first layer has another gradient. That of q is too small to see."""
    fault: dict[str, Any] = {"fault": "sum_of_products", "how": without_the_adapters_part}
    experiments = [replace(ADAPTED, method={"targets": {target: 2}}, **AGAIN) for target in ("v", "fc1")]
    whole = [replace(one, layout=Layout(), tp_comm_overlap=False) for one in experiments]
    broken = pool.run(2, train_broken, **fault, experiments=experiments)[0]
    sound = pool.run(2, train_soundly, experiments=experiments)[0]
    for record, good, twin in zip(broken, sound, pool.run(1, train_twins, experiments=whole)[0], strict=True):
        assert compare(good, twin) > 0
        with pytest.raises(Mismatch, match=r"^norm of step 0"):
            compare(record, twin)


def test_training_notices_own_rows_without_their_update(pool: Pool, twins: list[Record]) -> None:
    """Which q, k and v get while other ranks' rows are multiplied."""
    fault: dict[str, Any] = {"fault": "product_of_all", "how": nothing_on_own_rows}
    experiments = dict(zip(("q", "o", "fc1", "fc2"), zip(ONE_EACH, twins, strict=True), strict=True))
    of_q, of_fc1 = experiments["q"], experiments["fc1"]
    broken, other = pool.run(2, train_broken, **fault, experiments=[of_q[0], of_fc1[0]])[0]
    with pytest.raises(Mismatch, match=r"^norm of step 0"):
        compare(broken, of_q[1])
    assert compare(other, of_fc1[1]) > 0  # its update is the activation's to add
