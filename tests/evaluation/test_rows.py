# SPDX-License-Identifier: Apache-2.0
"""Which rows are instances, how tasks are decoded by default, and in which order answers come."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from data_prep.writer import DatasetWriter
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.answering import Answer
from lora_megatron.evaluation.answers import answers
from lora_megatron.evaluation.decoder import Decoder, Pick
from lora_megatron.evaluation.defaults import decoding_of
from lora_megatron.evaluation.rows import Prompt, instances_of
from lora_megatron.evaluation.settings import Decoding
from lora_megatron.measure.rows_progress import RowsProgress
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.conftest import SHARED_DATA
from tests.evaluation.commands import save_rows
from tests.pool import Pool

ROWS = [("a", ["1", "2"]), ("b", ["3"]), ("a", ["1", "2"]), ("b", ["4"]), ("a", ["5", "6"]), ("b", ["3"])]


def test_rows_with_the_same_context_and_references_are_one_instance(tmp_path: Path) -> None:
    table = open_examples(save_rows(tmp_path / "rows", ROWS), with_references=True)
    grouped = instances_of(table, group=True)
    assert [(i.id, i.context, i.references) for i in grouped] == [
        ("row-0", "a", ("1", "2")),
        ("row-1", "b", ("3",)),
        ("row-3", "b", ("4",)),  # one reference each: other rows, whose answers differ
        ("row-4", "a", ("5", "6")),
        ("row-5", "b", ("3",)),
    ]
    assert [i.id for i in instances_of(table, group=False)] == [f"row-{row}" for row in range(len(ROWS))]
    assert instances_of(table, group=True, limit=3) == grouped[:3]


def test_what_scorers_know_besides_comes_along(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "d", preparer="test", options={}, with_meta=True)
    with writer, writer.split("test") as split:
        for row in range(3):
            split.write(id=str(row), context="c", target="t", references=["t", "u"], meta=f'{{"row": {row // 2}}}')
    table = open_examples(tmp_path / "d" / "test.parquet", with_references=True)
    assert [(i.id, i.meta) for i in instances_of(table, group=True)] == [("0", '{"row": 0}'), ("2", '{"row": 1}')]
    assert open_examples(tmp_path / "d" / "test.parquet").meta(0) is None  # training does not read it


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the published E2E files")
def test_the_e2e_test_set_has_630_contexts(tmp_path: Path) -> None:
    from data_prep.__main__ import main

    assert main(["e2e", "--raw", str(SHARED_DATA / "e2e"), "--out", str(tmp_path / "e2e")]) == 0
    table = open_examples(tmp_path / "e2e" / "test.parquet", with_references=True)
    assert (len(table), len(instances_of(table, group=True))) == (4693, 630)


def test_defaults_give_way_to_flags() -> None:
    assert decoding_of("mnli", {}) == decoding_of(None, {"beams": None}) == Decoding()
    assert decoding_of("dart", {}).kind == "beams"
    assert decoding_of("e2e", {"beams": 4, "no_repeat_prompt": True}) == Decoding(
        beams=4, length_penalty=0.8, no_repeat_ngram=4
    )
    assert decoding_of("webnlg", {"beams": 1}).kind == "greedy"
    assert decoding_of("webnlg", {"sample": True, "top_k": 3}).kind == "sampling"
    with pytest.raises(ConfigError, match="--seed 3 says nothing in beams decoding: add --sample"):
        decoding_of("e2e", {"seed": 3})


class Nothing:
    """No model."""

    def start(self, prompts: Sequence[Sequence[int]], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError

    advance = select = start


class Lengths:
    """Answers with the prompt's length, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def fit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return list(prompts)

    def answer(self, decoder: Decoder, prompts: Sequence[Prompt]) -> list[Answer]:
        self.batches.append([prompt.id for prompt in prompts])
        return [{"prediction": f"{prompt.id}:{len(prompt.ids)}"} for prompt in prompts]

    def batch_size(self) -> int:
        return 2


PROMPTS = [Prompt(str(row), [0] * (1 + row * 7 % 11)) for row in range(37)]
WANTED = [f"{prompt.id}:{len(prompt.ids)}" for prompt in PROMPTS]


def answered(first: int) -> tuple[list[str], list[list[str]], int]:
    """On every rank: the answers, its batches, and how many rows it was told of."""
    build_mesh(Layout(), seed=1)
    lengths, told = Lengths(), []
    parts = answers(Nothing(), PROMPTS, lengths, batch_size=2, first=first, on_batch=told.append)
    return [answer["prediction"] for part in parts for answer in part], lengths.batches, sum(told)


def test_answers_come_in_order_whoever_found_them(pool: Pool) -> None:
    alone = pool.run(1, answered, first=0)[0][1]
    for world in (1, 2, 3):
        ranks = pool.run(world, answered, first=0)
        assert all(found == WANTED for found, _, _ in ranks)
        assert all(told == len(PROMPTS) for _, _, told in ranks)
        batches = [batch for _, mine, _ in ranks for batch in mine]
        assert sorted(batches) == sorted(alone), "the same batches, shared out"
        assert max(len(mine) for _, mine, _ in ranks) <= -(-len(batches) // world) + 3
    lengths = [[len(PROMPTS[int(row)].ids) for row in batch] for batch in alone]
    window = [length for batch in lengths[:8] for length in batch]
    assert window == sorted(window, reverse=True), "like beside like"


def sizes_of_parts(batch_size: int, rows: int) -> list[int]:
    """On every rank: how many answers are handed out at a time."""
    build_mesh(Layout(), seed=1)
    prompts = [Prompt(str(row), [0]) for row in range(rows)]
    return [len(part) for part in answers(Nothing(), prompts, Lengths(), batch_size=batch_size)]


def test_large_batches_are_not_kept_back_for_long(pool: Pool) -> None:
    assert pool.run(1, sizes_of_parts, batch_size=2, rows=40) == [[16, 16, 8]]
    assert pool.run(1, sizes_of_parts, batch_size=100, rows=630) == [[200, 200, 200, 30]]
    assert pool.run(1, sizes_of_parts, batch_size=300, rows=630) == [[300, 300, 30]]
    assert pool.run(2, sizes_of_parts, batch_size=128, rows=630) == [[256, 256, 118]] * 2
    assert pool.run(3, sizes_of_parts, batch_size=200, rows=630) == [[600, 30]] * 3, "a batch for every rank"


@pytest.mark.parametrize("first", [1, 15, 16, 36, 37])
def test_answers_go_on_with_the_same_batches(pool: Pool, first: int) -> None:
    whole = pool.run(1, answered, first=0)[0][1]
    found, batches, _ = pool.run(1, answered, first=first)[0]
    assert found == WANTED[first:]
    assert batches == whole[first // 16 * 8 :][: len(batches)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "bar"), [(io.StringIO(), True), (Terminal(), False)], ids=["file", "no-bar"])
def test_progress_is_a_line_now_and_then(stream: io.StringIO, bar: bool) -> None:
    times = iter((0.0, 1.0, 6.0, 7.0, 12.0, 13.0, 18.0))
    with RowsProgress(100, first=40, description="e2e", bar=bar, stream=stream, clock=lambda: next(times)) as progress:
        for _ in range(6):
            progress.advance(10)
    assert stream.getvalue().splitlines() == [
        "e2e  60 of 100 rows  3.3 rows/s  12.0 s left",
        "e2e  80 of 100 rows  3.3 rows/s  6.00 s left",
        "e2e  100 of 100 rows  3.3 rows/s",
    ]
