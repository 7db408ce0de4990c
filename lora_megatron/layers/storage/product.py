# SPDX-License-Identifier: Apache-2.0
"""One of the two products of a frozen weight, x W^T or dL/dy W, over rows that may come from other ranks and in pieces.

Rows are made ready once, where they are (`parts`: a matrix itself, or its FP8 codes and scales), and multiplied
anywhere (`into`): a row's result depends on that row alone, so pieces and their order change no more than the rounding
of a library that multiplies fewer rows in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """Rows [m, k] -> [m, columns] in `dtype`."""

    columns: int
    dtype: torch.dtype
    parts: Callable[[Tensor], tuple[Tensor, ...]]
    """What the product reads of rows [m, k]: matrices of m rows each, contiguous."""
    into: Callable[..., None]
    """into(out, *parts) writes the product of these rows over out [m, columns]."""

    def of(self, *parts: Tensor) -> Tensor:
        """The product of rows made ready."""
        out = torch.empty(parts[0].shape[0], self.columns, dtype=self.dtype, device=parts[0].device)
        self.into(out, *parts)
        return out


def product_with(matrix: Tensor, bias: Tensor | None = None) -> Product:
    """x matrix + bias in the matrix's own type: matrix [k, n], bias [n]."""

    def into(out: Tensor, x: Tensor) -> None:
        if bias is None:
            torch.mm(x, matrix, out=out)
        else:
            torch.addmm(bias, x, matrix, out=out)

    return Product(matrix.shape[1], matrix.dtype, lambda x: (x.contiguous(),), into)
