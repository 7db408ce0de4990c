# SPDX-License-Identifier: Apache-2.0
"""Micro-batches as a pure function of the global sample index.

Sample i of the endless training stream is row permutation(seed, i // n)[i % n] of the n rows. So a resumed run needs
one number, the count of samples consumed, and data-parallel ranks need only agree on who takes which index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch

from lora_megatron.data.examples import Loss, check_row_options, loss_positions, pack, tokenise_example
from lora_megatron.data.parquet import ExampleTable
from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.errors import ConfigError
from lora_megatron.parallel.heartbeat import beat

Microbatch = dict[str, Any]
_EMPTY_ROW = -1


@dataclass(frozen=True)
class TokenCache:
    """All examples tokenised once, end to end in one array (n examples, t ids in all)."""

    ids: np.ndarray
    """[t] int32."""
    offsets: np.ndarray
    """[n + 1] int64; example i is ids[offsets[i]:offsets[i + 1]]."""
    target_starts: np.ndarray
    """[n] int32; index of the first target token within its example."""
    truncated: int
    """How many examples lost tokens to fit the sequence length."""

    @classmethod
    def build(cls, table: ExampleTable, tokenizer: Tokenizer, sequence_length: int) -> TokenCache:
        """Tokenise every row of `table`, trimmed to sequence_length + 1 ids.

        Raises DataError where a chat template rendered the rows for another tokenizer.
        """
        table.check_tokenizer(tokenizer)
        chunks, starts, truncated = [], [], 0
        for _, context, target in table:
            beat()
            example = tokenise_example(context, target, tokenizer, sequence_length, rendered=table.rendered)
            chunks.append(np.asarray(example.ids, dtype=np.int32))
            starts.append(example.target_start)
            truncated += example.truncated
        offsets = np.zeros(len(chunks) + 1, dtype=np.int64)
        np.cumsum([len(chunk) for chunk in chunks], out=offsets[1:])
        return cls(np.concatenate(chunks), offsets, np.asarray(starts, dtype=np.int32), truncated)

    def example(self, index: int) -> tuple[np.ndarray, int]:
        """(ids, target_start) of example `index`."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]], int(self.target_starts[index])


class Microbatches(Sequence[Microbatch]):
    """Micro-batches that are made when they are asked for, each time anew: with packing each has a mask of s x s."""

    def __init__(self, numbers: range, make: Callable[[int], Microbatch]) -> None:
        self._numbers, self._make = numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Microbatch: ...

    @overload
    def __getitem__(self, index: slice) -> Microbatches: ...

    def __getitem__(self, index: int | slice) -> Microbatch | Microbatches:
        if isinstance(index, slice):
            return Microbatches(self._numbers[index], self._make)
        return self._make(self._numbers[index])


class BatchSource:
    """Micro-batches of one data set; `len()` is the number of rows (of packed rows with packing) in an epoch.

    sequence_length: positions per row; micro_batch_size: rows per micro-batch of one data-parallel rank.
    loss: "target" counts the target's tokens and eos, "all" every token but padding.
    packing: put several examples into a row, with an attention mask that keeps them apart.
    seed, shuffle: which order each epoch has; without shuffle it is the file's.

    Raises ConfigError for values that cannot work.
    """

    def __init__(
        self,
        table: ExampleTable,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        micro_batch_size: int,
        loss: Loss = "target",
        packing: bool = False,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        check_row_options(sequence_length, loss)
        if micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size {micro_batch_size} must be 1 or more")
        if seed < 0:
            raise ConfigError(f"data seed {seed} must be 0 or more")
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.packing = packing
        self.content_hash = table.content_hash
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self._loss: Loss = loss
        self._pad_id = tokenizer.pad_id
        self._cache = TokenCache.build(table, tokenizer, sequence_length)
        lengths = np.diff(self._cache.offsets) - 1
        self._rows: Sequence[range] = (
            pack(lengths.tolist(), sequence_length) if packing else [range(i, i + 1) for i in range(len(lengths))]
        )
        self._order = lru_cache(maxsize=2)(lambda epoch: _permutation(seed, epoch, len(self._rows), shuffle))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def examples(self) -> int:
        """Rows of the file, whatever the packing."""
        return len(self._cache.target_starts)

    @property
    def truncated_rows(self) -> int:
        """How many examples lost tokens to fit the sequence length."""
        return self._cache.truncated

    def microbatch(self, first_sample: int) -> Microbatch:
        """Samples first_sample .. first_sample + micro_batch_size - 1 of the endless stream.

        tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s]; attention_mask: None, or with packing
        bool [b, 1, s, s], True where a position must not be seen; first_sample: int. Only inputs of the model and
        the loss depend on the data, never the shapes.
        """
        n = len(self)
        samples = range(first_sample, first_sample + self.micro_batch_size)
        return self._collate([int(self._order(sample // n)[sample % n]) for sample in samples], first_sample)

    def evaluation_microbatches(self, dp_rank: int, dp_size: int, *, multiple_of: int = 1) -> Microbatches:
        """Every row exactly once over all data-parallel ranks, in the file's order.

        Each rank gets the same number of micro-batches, a multiple of `multiple_of`, so that collectives match; rows
        beyond the end are padding with a loss_mask of zero. `first_sample` is the index of the micro-batch's first row.
        """
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        b = self.micro_batch_size
        rounds = -(-len(self) // (b * dp_size * multiple_of))

        def make(number: int) -> Microbatch:
            first = (number * dp_size + dp_rank) * b
            rows = range(first, first + b)
            return self._collate([row if row < len(self) else _EMPTY_ROW for row in rows], first)

        return Microbatches(range(rounds * multiple_of), make)

    def _collate(self, rows: list[int], first_sample: int) -> Microbatch:
        shape = (len(rows), self.sequence_length)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, self._pad_id, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        positions = np.tile(np.arange(self.sequence_length, dtype=np.int64), (len(rows), 1))
        segments = np.full(shape, -1, dtype=np.int32)  # padding is a segment of its own: no row without a visible key
        for b, row in enumerate(rows):
            end = 0
            for segment, index in enumerate(self._rows[row] if row != _EMPTY_ROW else ()):
                ids, target_start = self._cache.example(index)
                start, end = end, end + len(ids) - 1
                tokens[b, start:end] = ids[:-1]
                labels[b, start:end] = ids[1:]
                loss_mask[b, start:end][loss_positions(len(ids), target_start, self._loss)] = 1.0
                positions[b, start:end] -= start
                segments[b, start:end] = segment
            positions[b, end:] -= end
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": _block_diagonal_mask(segments) if self.packing else None,
            "first_sample": first_sample,
        }


def _block_diagonal_mask(segments: np.ndarray) -> torch.Tensor:
    """Causal within a segment, blind across them: bool [b, 1, s, s], True = masked, from segment ids [b, s]."""
    ids = torch.from_numpy(segments)
    s = ids.shape[1]
    other_segment = ids[:, :, None] != ids[:, None, :]  # [b, s, s]
    future = torch.ones(s, s, dtype=torch.bool).triu(diagonal=1)
    return (other_segment | future)[:, None]


def _permutation(seed: int, epoch: int, n: int, shuffle: bool) -> np.ndarray:
    """The order of rows in `epoch`, int64 [n].

    Sorts PCG64's raw draws, since NumPy promises that stream for good but not what Generator.permutation makes of
    it: a run resumed under another NumPy continues with the same data.
    """
    if not shuffle:
        return np.arange(n)
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(draws, kind="stable")
