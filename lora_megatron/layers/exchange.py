# SPDX-License-Identifier: Apache-2.0
"""Collectives behind products: GPUs of one host that copy from and into each other's memory while they multiply.

A collective of NCCL's before or after a product leaves the tensor cores idle, and beside one takes processors from it.
Here the rows of a product are cut by the rank they belong to, and copy engines move some while others are multiplied:

    product_of_all     own rows first, while the next rank's arrive: copied from the box into which that rank put them
    sum_of_products    own rows last, while those of the ranks before are on their way into the boxes of their owners;
                       the owner adds up what it was sent, in rank order and in fp32

What a layer's adapters need of other ranks is small, and waiting for it would cost more than moving it. It goes
`beside` these rows, in the same box and behind the same barrier, gathered or summed like them but not by the product;
where it is a gradient du of u = x A^T, du A is added to the rows while both are summed.

One box of each kind is enough, with one barrier for each product: gathers and sums take turns, in a layer's forward
pass and in its backward pass, and the barrier of the one says that all ranks are done with the box of the other. Where
two of a kind follow each other, or may have, another barrier goes between them.

The boxes (`parallel.shared_box`) lie outside the caching allocator; `bytes_of` counts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.aside import BESIDE_PRODUCT, FOR_COPIES, FOR_THE_END
from lora_megatron.layers.low_rank_input import add_input_gradient
from lora_megatron.layers.storage.product import Product
from lora_megatron.parallel.shared_box import ALIGNMENT, Box, aligned, all_made, made_over

try:
    from lora_megatron.layers import exchange_kernels as kernels
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below

OPTION = "parallel.tp_comm_overlap"


def exchange_over(group: dist.ProcessGroup) -> Exchange:
    """The one exchange of a tensor-parallel group, shared by all its layers.

    Every rank of the group must ask for it at the same time, the first time.

    Raises:
        ConfigError: the GPUs of the group do not reach each other's memory.
    """
    return made_over(Exchange, group, lambda: Exchange(group))


def forget_turns() -> None:
    """To be called around the capture of a CUDA graph and after each launch of one: whose turn it was is then not what
    this process last asked for, and the next product of each exchange begins with a barrier."""
    for exchange in all_made(Exchange):
        exchange.last = ""


def bytes_of(own_tokens: int, width: int, size: int, itemsize: int, *, beside: int = 0) -> int:
    """What both boxes take on each of `size` ranks, whose hidden states are [own_tokens, width].

    beside: the most columns that travel with them.
    """
    parts = [own_tokens * columns * itemsize for columns in (width, beside)]
    return sum(aligned(part) + aligned(size * part) for part in parts)


class Exchange:
    """What a rank needs to exchange rows with the others of its tensor-parallel group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        assert self.size > 1, "sequence shards of one rank"
        self.copies = torch.cuda.Stream(priority=-1)
        self.boxes = {"gather": Box(group, needed_by=OPTION), "sum": Box(group, needed_by=OPTION)}
        self.beside = 0
        """The most columns that a layer sends beside its rows; with room for them no box grows where layers differ."""
        self.last = ""  # the kind of the last product; empty where that is not known
        for box in self.boxes.values():
            box.holding(ALIGNMENT)

    def product_of_all(
        self,
        product: Product,
        parts: Sequence[Tensor],
        beside: Tensor | None = None,
        on_own: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`parts` of this rank's m rows, of every rank -> [t m, n], all ranks' rows in their order; and theirs of
        `beside` [m / b, b, k], as they are. `on_own` is done aside (`layers.aside`) with this rank's rows of the
        result, while those of the others are multiplied."""
        main, rows = torch.cuda.current_stream(), parts[0].shape[0]
        places, total = _places(parts)
        box = self._box("gather", total + self._room(product, rows, beside))
        FOR_COPIES.start()
        for part, place in zip(parts, places, strict=True):
            box.at(self.rank, part, place).copy_(part)
        if beside is not None:
            FOR_COPIES.wait()
            box.at(self.rank, beside, total).copy_(beside)
        FOR_THE_END.start()
        box.barrier()
        out = torch.empty(self.size * rows, product.columns, dtype=product.dtype, device=parts[0].device)
        received, whole = self._bring(box, parts, places, beside, total)
        own = out[self.rank * rows :][:rows]
        product.into(own, *parts)
        if on_own is not None:
            BESIDE_PRODUCT.do(partial(on_own, own))
            BESIDE_PRODUCT.start()
        for owner, (copies, arrival) in zip(self._others(), received, strict=True):
            main.wait_event(arrival)
            product.into(out[owner * rows :][:rows], *copies)
        BESIDE_PRODUCT.wait()
        if whole is None:
            return out, None
        main.wait_stream(self.copies)
        return out, whole.flatten(0, 1)

    def _bring(
        self, box: Box, parts: Sequence[Tensor], places: Sequence[int], beside: Tensor | None, beside_place: int
    ) -> tuple[list[tuple[list[Tensor], torch.cuda.Event]], Tensor | None]:
        """On their way: each other rank's parts, with the event of their arrival; and what all ranks have beside them,
        there when the copies' stream is done."""
        received = [[torch.empty_like(part) for part in parts] for _ in range(self.size - 1)]
        whole = None if beside is None else beside.new_empty(self.size, *beside.shape)
        # Behind these: torch's deterministic mode fills new memory, on the main stream.
        self.copies.wait_stream(torch.cuda.current_stream())
        arrivals = []
        with torch.cuda.stream(self.copies):
            if whole is not None and beside is not None:
                for owner in self._others():
                    whole[owner].copy_(box.at(owner, beside, beside_place), non_blocking=True)
            for owner, copies in zip(self._others(), received, strict=True):
                for copy, place in zip(copies, places, strict=True):
                    copy.copy_(box.at(owner, copy, place), non_blocking=True)
                arrivals.append(self.copies.record_event())
            if whole is not None and beside is not None:
                # Behind the rows: no copy engine does it, and a processor is free when the product comes to its end.
                whole[self.rank].copy_(beside, non_blocking=True)
        return list(zip(received, arrivals, strict=True)), whole

    def sum_of_products(
        self,
        product: Product,
        parts: Sequence[Tensor],
        beside: Tensor | None = None,
        factors: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """`parts` of all t m rows -> this rank's m rows of the sum over ranks [m, n]; and of that of `beside`
        [t m / b, b, k], whose product with the stacked `factors` [k, n] is added to the rows."""
        main, rows = torch.cuda.current_stream(), parts[0].shape[0] // self.size
        like = torch.empty(self.size, rows, product.columns, dtype=product.dtype, device="meta")
        place = aligned(like.numel() * like.element_size())
        box = self._box("sum", place + self._room(product, self.size * rows, beside))
        addends = [box.at(self.rank, like)]
        self.copies.wait_stream(main)
        if beside is not None:  # there before the products are
            beside = beside.unflatten(0, (self.size, -1))
            addends.append(box.at(self.rank, beside, place))
            FOR_COPIES.join(self.copies)  # who may be making `beside`
            with torch.cuda.stream(self.copies):
                for owner in (*self._others(), self.rank):
                    box.at(owner, beside, place)[self.rank].copy_(beside[owner], non_blocking=True)
        sent = []  # until the copies have been waited for
        for owner in self._others():
            piece = product.of(*(_rows(part, owner * rows, rows) for part in parts))
            sent.append(piece)
            done = main.record_event()
            with torch.cuda.stream(self.copies):
                self.copies.wait_event(done)
                box.at(owner, like)[self.rank].copy_(piece, non_blocking=True)
        product.into(addends[0][self.rank], *(_rows(part, self.rank * rows, rows) for part in parts))
        main.wait_stream(self.copies)
        box.barrier()
        return _sums(addends, factors)

    def _others(self) -> list[int]:
        """The other ranks, each of which has a different first one."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _room(self, product: Product, rows: int, beside: Tensor | None) -> int:
        """Bytes for what this product, or any other of so many rows, has beside them."""
        assert beside is None or beside.dtype == product.dtype
        columns = self.beside if beside is None else max(self.beside, beside.shape[-1])
        return aligned(rows * columns * product.dtype.itemsize)

    def _box(self, kind: str, size: int) -> Box:
        """That box, free to be written into."""
        box = self.boxes[kind]
        box.holding(size)
        if self.last in ("", kind):
            box.barrier()
        self.last = kind
        return box


def _sums(addends: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Over ranks, of rows and of what went beside them, if anything; with its product with `factors` added."""
    by_kernel = kernels is not None and addends[0].is_cuda
    if by_kernel and kernels.can_add(addends, factors):
        rows, beside = kernels.sums_with_products(addends, factors)
        return rows, beside
    rows, *rest = kernels.sums_in_order(addends) if by_kernel else [each.sum(0) for each in addends]
    if factors:
        rows = add_input_gradient(rows, rest[0], factors, None)
    return rows, rest[0] if rest else None


def _rows(part: Tensor, start: int, count: int) -> Tensor:
    """That many rows from `start`; a copy where they begin at a place from which a library's product cannot read."""
    rows = part[start:][:count]
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _places(parts: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where in a box each part begins, and how much they take, in bytes."""
    *places, end = itertools.accumulate((aligned(part.nbytes) for part in parts), initial=0)
    return places, end
