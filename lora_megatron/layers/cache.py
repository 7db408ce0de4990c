# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the positions a model has run, so that decoding runs one new position at a time.

megatron-core's static context has one position for a whole batch: shorter prompts are then padded on the left, and a
row's rotary angles depend on its batch mates. Its dynamic context needs flash attention's kernels. Here every row has
a position of its own, and a token's place in the cache is its position in the text: what a row computes is what it
computes alone. Padding stands on the right, is never seen by a real position, and is overwritten as the row grows.

    keys, values    [b, groups, t, d] of each attention layer of this rank; groups are the tensor rank's
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 32  # positions by which a cache grows: between copying at every step and holding what is never used
_ALIGNED = 16  # positions of which attention is given a multiple: its kernels on a GPU would pad the mask in each layer


class Span:
    """The positions that the running forward pass computes; all layers of a rank look at the same one.

    starts: the first new position of each row; count: how many, the same for every row.
    """

    def __init__(self, starts: Sequence[int], count: int, device: torch.device) -> None:
        self.first = not any(starts)
        """Nothing came before: attention is causal among the new positions alone."""
        self.stop = max(starts) + count
        self.kept = -(-self.stop // _ALIGNED) * _ALIGNED
        """Positions of the cache that attention reads; those from `stop` on are zeros that nobody sees."""
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)  # [b, s]
        self.rows = torch.arange(len(starts), device=device)[:, None]
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def mask(self, window: int, dtype: torch.dtype) -> Tensor:
        """[b, 1, s, kept]: 0 where a new position sees a kept one (up to itself, of the last `window`; 0: all), else
        -inf. Made once for all layers."""
        if (window, dtype) not in self._masks:
            distance = self.positions[:, :, None] - torch.arange(self.kept, device=self.positions.device)
            hidden = (distance < 0) | (distance >= window) if window else distance < 0
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, dtype] = mask[:, None]
        return self._masks[window, dtype]


class LayerCache:
    """What one attention layer has seen. `span` is to be set before each forward pass."""

    def __init__(self) -> None:
        self.span: Span | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v [s, b, groups, d] of the span's positions; all up to its end, [b, groups, span.kept, d]."""
        assert self.span is not None
        new = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        self.keys, self.values = (self._room(old, x) for old, x in zip((self.keys, self.values), new, strict=True))
        for held, x in ((self.keys, new[0]), (self.values, new[1])):
            if self.span.first:
                held[:, :, : x.shape[2]] = x
            else:
                held[self.span.rows, :, self.span.positions] = x.transpose(1, 2)  # [b, s, groups, d]
        return self.keys[:, :, : self.span.kept], self.values[:, :, : self.span.kept]

    def _room(self, held: Tensor | None, new: Tensor) -> Tensor:
        assert self.span is not None
        size = -(-self.span.stop // _BLOCK) * _BLOCK
        batch, groups, _, dim = new.shape
        if held is not None and size <= held.shape[2]:
            return held
        larger = new.new_zeros(batch, groups, size, dim)
        if held is not None:
            larger[:, :, : held.shape[2]] = held
        return larger

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order; a row may be taken several times, or not at all."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """softmax(q k^T * scale) v over a cache: q [s, b, heads, d], mask [b, 1, s, t] -> [s, b, heads * d].

    The query heads of a group become queries of that group, so that no key is copied for each of them.
    """
    steps, batch, heads, dim = query.shape
    groups = keys.shape[1]
    q = query.permute(1, 2, 0, 3).reshape(batch, groups, heads // groups * steps, dim)
    mask = mask.expand(batch, heads // groups, steps, -1).reshape(batch, 1, q.shape[2], -1)
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, steps, dim).permute(2, 0, 1, 3).flatten(2)
