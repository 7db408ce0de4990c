# SPDX-License-Identifier: Apache-2.0
"""The quickstart's corpora: deterministic, disjoint, short, and different between the domains."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.grammar import DOMAINS, MOST_BYTES, Draws
from data_prep.synthetic import distinct_pairs
from lora_megatron.data.parquet import open_examples

SPLITS = ("train", "validation", "test")


def generate(out: Path, domain: str, *flags: str, seed: int = 3) -> int:
    return main(["synthetic", "--out", str(out), "--domain", domain, "--seed", str(seed), *flags])


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_seed_gives_the_same_bytes_and_another_seed_others(domain: str, tmp_path: Path) -> None:
    flags = ("--rows", "200")
    assert [generate(tmp_path / name, domain, *flags) for name in "ab"] == [0, 0]
    assert generate(tmp_path / "c", domain, *flags, seed=4) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7  # three CSV, three Parquet, the manifest
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert all((tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes() for file in files)


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_are_disjoint_and_short(domain: str, tmp_path: Path) -> None:
    assert generate(tmp_path / "out", domain) == 0
    tables = [open_examples(tmp_path / "out" / f"{split}.parquet", with_references=True) for split in SPLITS]
    assert [len(table) for table in tables] == [4000, 200, 200]
    contexts = [context for table in tables for _, context, _ in table]
    assert len(set(contexts)) == len(contexts)
    sizes = [len(context.encode()) + len(target.encode()) for table in tables for _, context, target in table]
    assert max(sizes) <= MOST_BYTES  # with a line end and an eos, 128 ids


def test_held_out_rows_do_not_depend_on_the_number_of_rows(tmp_path: Path) -> None:
    assert generate(tmp_path / "a", "hotels", "--rows", "10") == 0
    assert generate(tmp_path / "b", "hotels", "--rows", "30") == 0
    assert (tmp_path / "a" / "test.parquet").read_bytes() == (tmp_path / "b" / "test.parquet").read_bytes()


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_sentence_copies_every_value_of_its_context_and_adds_a_number(domain: str) -> None:
    for index in range(500):
        draws = Draws(index)
        meaning = DOMAINS[domain].meaning(draws)
        sentence = DOMAINS[domain].sentence(meaning, draws)
        assert all(value in sentence for value in meaning.values())
        assert re.search(r" Call \d\d \d\d \d\d[.!]$", sentence)
        assert 2 <= len(meaning) <= 3


def test_hotels_have_values_slots_and_a_style_of_their_own() -> None:
    restaurants, hotels = DOMAINS["restaurants"], DOMAINS["hotels"]
    values = [{value for slot in domain.values.values() for value in slot} for domain in (restaurants, hotels)]
    assert not values[0] & values[1]
    assert set(restaurants.values) & set(hotels.values) == {"area"}
    endings = [
        [sentence[-1] for _, sentence in islice(distinct_pairs(domain, 1), 300)] for domain in (restaurants, hotels)
    ]
    assert set(endings[1]) == {"!"}
    assert 0.2 < endings[0].count("!") / 300 < 0.5


def test_impossible_numbers_of_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "out", "hotels", "--rows", "1000000") == 2
    assert "must be 1 to 50000" in capsys.readouterr().err
    assert generate(tmp_path / "out", "hotels", "--rows", "0") == 2
    assert generate(tmp_path / "out", "hotels", "--held-out-rows", "0") == 2
    assert not (tmp_path / "out").exists()
