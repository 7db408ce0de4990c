# SPDX-License-Identifier: Apache-2.0
"""An MLP's activation with the adapters of both its layers: one pass on a GPU, one operation after the other elsewhere.

Both are held to plain algebra in fp64; on a CPU the kernels' cut into programs is all of them that runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_megatron.layers import mlp_adapter_tiles as tiles
from lora_megatron.layers.activation import ACTIVATIONS, Activation
from lora_megatron.layers.adapted_activation import AdaptedActivation
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.qkv import Part, gated_parts, whole

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: the kernels are Triton's")]
TOKENS, COLUMNS = 150, 300
ADAPTED: dict[str, tuple[bool, tuple[Part, ...], bool]] = {
    "fc1 and fc2": (False, whole("fc1", COLUMNS), True),
    "fc1": (False, whole("fc1", COLUMNS), False),
    "fc2": (False, (), True),
    "gate, up and fc2": (True, gated_parts(COLUMNS), True),
    "gate and up": (True, gated_parts(COLUMNS), False),
    "gate": (True, gated_parts(COLUMNS)[:1], False),
    "up and fc2": (True, gated_parts(COLUMNS)[1:], True),
    "fc2, gated": (True, (), True),
}


class Problem:
    """One MLP's tensors, and what plain algebra makes of them in fp64."""

    def __init__(self, name: str, adapted: str, *, bias: bool, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        gated, self.parts, fc2 = ADAPTED[adapted]
        self.activation, width = Activation(name, gated), 2 * COLUMNS if gated else COLUMNS
        self.ranks, self.scales = ranks[: len(self.parts)], (1.7, -0.6)[: len(self.parts)]
        self.z, self.dy = random(TOKENS, width), random(TOKENS, COLUMNS)
        self.bias = random(width) if bias else None
        self.u = random(TOKENS, sum(self.ranks)) if self.parts else None
        self.bs = [random(part.rows, rank) for part, rank in zip(self.parts, self.ranks, strict=True)]
        self.a, self.du2 = (random(ranks[2], COLUMNS), random(TOKENS, ranks[2])) if fc2 else (None, None)

    def on(self, device: torch.device) -> tuple[AdaptedActivation, Tensor, Tensor, Tensor | None]:
        """(what is tested, z, dy, du2)"""

        def moved(value: Any) -> Any:
            return None if value is None else value.to(device, copy=True)

        update = None
        if self.u is not None:
            update = Update(self.parts, self.scales, moved(self.u), tuple(moved(b).requires_grad_() for b in self.bs))
        a = None if self.a is None else moved(self.a).requires_grad_()
        weights = torch.empty(0), torch.empty(0)  # of no format: the products read y and dz as they are
        between = AdaptedActivation(self.activation, *weights, moved(self.bias), update, a, None)
        return between, moved(self.z), moved(self.dy), moved(self.du2)

    def wanted(self) -> dict[str, Tensor]:
        """y, u2, dz, du, and the gradient of each factor."""
        leaves = {"dz": self.z, **({} if self.u is None else {"du": self.u})}
        leaves |= {part.name: b for part, b in zip(self.parts, self.bs, strict=True)}
        leaves = {name: t.double().requires_grad_() for name, t in leaves.items()}
        z, first = leaves["dz"] * 1, 0
        for part, scale, rank in zip(self.parts, self.scales, self.ranks, strict=True):
            u = leaves["du"][:, first : first + rank]
            z = z.index_add(1, torch.arange(part.start, part.stop), scale * u @ leaves[part.name].t())
            first += rank
        y = self.activation.exactly(z, self.bias)
        dy = self.dy.double()
        if self.a is not None and self.du2 is not None:
            dy = dy + self.du2.double() @ self.a.double()
        found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
        y = y.detach()
        if self.a is None or self.du2 is None:
            return {"y": y, **found}
        return {"y": y, "u2": y @ self.a.double().t(), **found, "fc2": self.du2.double().t() @ y}


def results(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    between, z, dy, du2 = problem.on(device)
    z = between.kept(z)
    with torch.no_grad():
        (y,), u2 = between.forward(z, (-1,))
        (dz,), du, dbs, da = between.backward(z, dy, du2, (-1,))
    factors = dict(zip((part.name for part in problem.parts), dbs, strict=True))
    found = {"y": y, "u2": u2, "dz": dz, "du": du, "fc2": da, **factors}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert set(got) == set(want)
    return {name: float((got[name].cpu().double() - w).norm() / w.norm()) for name, w in want.items()}


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_on_a_cpu_it_is_plain_algebra(name: str, adapted: str) -> None:
    problem = Problem(name, adapted, bias=True, ranks=(4, 16, 5), dtype=torch.float64)
    assert max(errors(results(problem, CPU), problem.wanted()).values()) < 1e-14


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize(
    ("dtype", "bound", "ranks"),
    [
        pytest.param(torch.float32, 5e-6, (4, 16, 5), id="fp32"),
        pytest.param(torch.bfloat16, 6e-3, (16, 3, 16), id="bf16"),
    ],
)
@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=on_gpu, id="gpu")])
def test_in_one_pass_it_is_plain_algebra(
    device: torch.device, dtype: torch.dtype, bound: float, ranks: tuple[int, ...], adapted: str
) -> None:
    """With tokens and columns that fill no tile; and to the bit the same when it is done again. In bf16 dz and y are
    rounded before they are multiplied, and each result is."""
    gated = ADAPTED[adapted][0]
    problem = Problem("silu" if gated else "gelu_tanh", adapted, bias=not gated, ranks=ranks, dtype=dtype)
    between, z, *_ = problem.on(device)
    assert between._in_one_pass(z)
    got = results(problem, device)
    assert max(errors(got, problem.wanted()).values()) < bound
    assert all(torch.equal(tensor, got[which]) for which, tensor in results(problem, device).items())


@pytest.mark.parametrize(
    ("name", "adapted"), [*((name, "fc1 and fc2") for name in ACTIVATIONS), ("silu", "up and fc2")]
)
@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=on_gpu, id="gpu")])
def test_gradients_are_added_to_sums_in_fp32(device: torch.device, adapted: str, name: str) -> None:
    """To sums so large that bf16 would hold no gradient beside them."""
    from lora_megatron.layers import mlp_adapters  # needs Triton

    problem = Problem(name, adapted, bias=True, ranks=(4, 16, 5), dtype=torch.bfloat16)
    between, z, dy, du2 = problem.on(device)
    update, a, gated = between.update, between.a, problem.activation.gated
    assert update is not None
    assert a is not None
    with torch.no_grad():
        mains = [torch.full(t.shape, 4096.0, device=device) for t in (*update.bs, a)]
        found = mlp_adapters.gradients(z, between.bias, update, a, du2, dy, name, gated=gated, mains=mains)
    assert found.factors == ()
    wanted = problem.wanted()
    for part, main in zip((*(part.name for part in problem.parts), "fc2"), mains, strict=True):
        added = main.cpu().double() - 4096
        assert float((added - wanted[part]).norm() / wanted[part].norm()) < 4e-3


@pytest.mark.parametrize("table", tiles.TABLES, ids=["forward", "projection", "backward"])
def test_tiles_are_what_a_tensor_core_takes(table: dict[int, tuple[tiles.Tile, tiles.Tile]]) -> None:
    assert list(table) == sorted(table)
    for tile in (one for pair in table.values() for one in pair):
        assert all(n & (n - 1) == 0 for n in tile[:4]), "powers of two"
        assert min(tile.tokens, tile.columns) >= 16
        assert tile.span % (tile.columns if table is tiles.PROJECTION_TILES else tile.tokens) == 0


def test_spans_are_long_where_programs_are_many() -> None:
    def span(tokens: int, columns: int, *, gated: bool = False) -> int:
        tile = tiles.backward_tile_of(2, [16, 16], tokens, columns, gated=gated)
        assert tile is not None
        return tile.span

    assert (span(2048, 49152), span(2048, 24576), span(4096, 24576)) == (1024, 512, 1024)
    assert span(1280, 98304) == 512, "half a long span would be walked in vain"
    assert span(8192, 28672, gated=True) == 1024
    assert tiles.backward_tile_of(2, [17], 2048, 49152, gated=False) is None


@pytest.mark.parametrize("itemsize", [2, 4])
def test_large_ranks_have_no_tile(itemsize: int) -> None:
    for table in tiles.TABLES:
        for gated in (False, True):
            assert tiles.tile_of(itemsize, [1, 16], table, gated=gated)
            assert tiles.tile_of(itemsize, [1, 17], table, gated=gated) is None


@pytest.mark.parametrize("tokens", [1, 300, 2048])
@pytest.mark.parametrize(("ranks", "fc2"), [((5,), 3), ((5, 1), 16), ((4,), 0), ((), 2)], ids=str)
def test_sums_have_places_of_their_own(ranks: tuple[int, ...], fc2: int, tokens: int) -> None:
    tile = tiles.Tile(32, 64, 128, 4)
    cut = tiles.addends_of(ranks, fc2, tokens, 150, tile, CPU)
    rows = cut.table.tolist()
    assert len(rows) == 2 * (len(ranks) + bool(fc2))
    end = 0
    for index, (first, count, length, own, pitch, place) in enumerate(rows):
        which, of_factor = index // 2, index % 2
        rank = (*ranks, fc2)[which]
        # du: this adapter's columns of all; a gradient: one behind the other.
        behind = 150 * sum(ranks[:which])
        want = (150 * rank, 0, behind) if of_factor else (rank, sum(ranks), sum(ranks[:which]))
        assert (own, pitch, place) == want
        of_tokens = tokens * rank if index // 2 < len(ranks) else 0
        assert (count, length) == ((-(-tokens // 128), 150 * rank) if index % 2 else (3, of_tokens))
        assert (first, cut.starts[index]) == (end, end)
        end += count * length
    assert (cut.size, cut.longest) == (end, max(row[2] for row in rows))


@pytest.mark.parametrize("gated", [False, True])
def test_the_plan_knows_of_all_addends(gated: bool) -> None:
    ranks, fc2 = ((8, 16) if gated else (16,)), 4
    for tokens, columns in ((300, 1000), (2048, 49152)):
        tile = tiles.backward_tile_of(2, [*ranks, fc2], tokens, columns, gated=gated)
        assert tile is not None
        known = tiles.addend_bytes(ranks, fc2, tokens, columns, gated=gated, itemsize=2)
        assert known == 4 * tiles.addends_of(ranks, fc2, tokens, columns, tile, CPU).size
    assert tiles.addend_bytes((17,), 0, 300, 1000, gated=gated, itemsize=2) == 0
    assert tiles.addend_bytes((), 0, 300, 1000, gated=gated, itemsize=2) == 0


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=on_gpu, id="gpu")])
def test_every_addend_and_place_is_summed(device: torch.device, added: bool) -> None:
    """More addends than a program takes at once (du has 10, a factor 7), more places, and a cut of its own for each."""
    from lora_megatron.layers.addend_kernels import sum_addends  # needs Triton

    cut = tiles.addends_of((5, 1), 3, 200, 640, tiles.Tile(32, 64, 32, 4), device)
    addends = torch.randn(cut.size, generator=torch.Generator().manual_seed(0)).to(device)
    factors = [torch.zeros(shape, device=device) for shape in ((640, 5), (640, 1), (3, 640))]
    du, mains = torch.zeros(200, 6, device=device), [torch.ones_like(factor) for factor in factors]
    given = mains if added else None
    found = sum_addends(addends, cut.table, cut.longest, du, factors, given, cut=(4, 512), factor_cut=(2, 128))
    sums = []
    for start, (_, count, length, *_) in zip(cut.starts, cut.table.tolist(), strict=True):
        sums.append(addends[start : start + count * length].view(count, length).double().sum(0))
    want = torch.cat([sums[0].view(200, 5), sums[2].view(200, 1)], 1)
    torch.testing.assert_close(du.double(), want, rtol=1e-5, atol=1e-5)  # sums in fp32
    for got, want in zip(mains if added else found, sums[1::2], strict=True):
        torch.testing.assert_close(got.double().flatten(), want + added, rtol=1e-5, atol=1e-5)
