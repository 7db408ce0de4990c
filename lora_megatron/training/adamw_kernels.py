# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel for an optimizer's step: clipping, AdamW and the rounding to bf16 of all factors in one pass.

Gradients, masters and moments are read once, masters, moments and parameters written once: 30 bytes for each place.
torch's fused AdamW, with a division and clipping before it and the rounding behind it, moves 50. A program finds its
tensors in a table on the GPU. `training.adamw_pass` has the same in torch's operations.

A moment is moved by 1 - beta of its distance from the gradient's: beta and 1 - beta as float32s of their own do not add
up to 1, and a moment would settle off its value by that (1e-5 of it at 0.999, 16% at 1 - 1e-7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PLACES, _WARPS = 512, 4
"""Of a program: the fastest of six for factors of GPT-3 175B's layers on an H200, where 2048 take 1.4 times as long."""
_FIELDS = tl.constexpr(7)


class Stepped(NamedTuple):
    """What belongs to one factor: fp32, as many places each, contiguous; `parameter` in bf16."""

    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    parameter: Tensor


class Table(NamedTuple):
    """Where all of it lies. It holds the tensors, which must stay where they are."""

    rows: Tensor
    """int64 [factors, fields] on the GPU: the addresses of a `Stepped`, its places and its first program."""
    owners: Tensor
    """int32 [programs]: whose each is."""
    aligned: int
    """What divides all addresses, of all factors: 16, 8, 4 or 2 bytes."""
    held: tuple[Stepped, ...]


@triton.jit
def _place(row, field: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to numbers of that kind."""
    return tl.multiple_of(tl.load(row + field), ALIGNED).to(tl.pointer_type(kind))


@triton.jit
def _step(
    rows, owners, numbers, rest1, rest2, eps, P: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """P places of one factor; rest1 and rest2: 1 - beta, rounded once."""
    program = tl.program_id(0)
    row = rows + tl.load(owners + program).to(tl.int64) * _FIELDS
    gradients = _place(row, 0, tl.float32, ALIGNED)
    masters = _place(row, 1, tl.float32, ALIGNED)
    firsts, seconds = _place(row, 2, tl.float32, ALIGNED), _place(row, 3, tl.float32, ALIGNED)
    parameters = _place(row, 4, tl.bfloat16, ALIGNED)
    factor, rate = tl.load(numbers), tl.load(numbers + 1)
    root, shrink = tl.load(numbers + 2), tl.load(numbers + 3)
    places = tl.where(tl.load(numbers + 4) > 0, tl.load(row + 5), 0)
    place = (program - tl.load(row + 6)) * P + tl.arange(0, P)
    inside = place < places
    gradient = tl.load(gradients + place, inside, 0.0) * factor
    master = tl.load(masters + place, inside, 0.0)
    first = tl.load(firsts + place, inside, 0.0)
    first += rest1 * (gradient - first)
    second = tl.load(seconds + place, inside, 0.0)
    second += rest2 * (gradient * gradient - second)
    master -= shrink * master
    master -= rate * first / (tl.sqrt(second) / root + eps)
    tl.store(firsts + place, first, inside)
    tl.store(seconds + place, second, inside)
    tl.store(masters + place, master, inside)
    tl.store(parameters + place, master.to(tl.bfloat16), inside)


def table_of(every: Sequence[Stepped]) -> Table:
    """Of all factors of a step."""
    rows, programs = list[list[int]](), list[int]()
    for each in every:
        assert all(tensor.is_contiguous() for tensor in each)
        assert [tensor.dtype for tensor in each] == [torch.float32] * 4 + [torch.bfloat16]
        rows.append([*(tensor.data_ptr() for tensor in each), each.master.numel(), sum(programs)])
        programs.append(triton.cdiv(each.master.numel(), _PLACES))
    device = every[0].master.device
    owners = torch.arange(len(every), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    aligned = math.gcd(16, *(address for row in rows for address in row[:5]))
    return Table(torch.tensor(rows, dtype=torch.int64, device=device), owners.to(device), aligned, tuple(every))


def step(table: Table, numbers: Tensor, *, betas: tuple[float, float], eps: float) -> None:
    """One step of AdamW in place, by numbers fp32 [5] on the GPU: the factor of gradients, lr / (1 - beta1^t),
    sqrt(1 - beta2^t), lr times weight decay, and 0 where nothing is to change. Gradients are left as they are."""
    rests = [1 - beta for beta in betas]
    _step[(table.owners.numel(),)](
        table.rows, table.owners, numbers, *rests, eps, _PLACES, table.aligned, num_warps=_WARPS
    )
