# SPDX-License-Identifier: Apache-2.0
"""The quickstart's corpora: deterministic, disjoint, short, and different between the domains."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.grammar import DOMAINS
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
def test_splits_are_disjoint_short_and_have_several_references(domain: str, tmp_path: Path) -> None:
    assert generate(tmp_path / "out", domain) == 0
    tables = [open_examples(tmp_path / "out" / f"{split}.parquet", with_references=True) for split in SPLITS]
    assert [len(table) for table in tables] == [4000, 200, 200]
    contexts = [{context for _, context, _ in table} for table in tables]
    assert len(set.union(*contexts)) == sum(len(split) for split in contexts)
    sizes = [(len(context.encode()), len(target.encode())) for table in tables for _, context, target in table]
    assert max(context for context, _ in sizes) <= 70
    assert max(target for _, target in sizes) <= 70
    # One line end and one eos more give the ids of an example; the first id is no label.
    assert sum(context + target + 1 > 128 for context, target in sizes) < 0.02 * len(sizes)
    assert 1.5 < len(tables[0]) / len(contexts[0]) < 2.5


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_sentence_copies_every_value_of_its_context(domain: str) -> None:
    for meaning in DOMAINS[domain].meanings():
        sentences = DOMAINS[domain].sentences(meaning)
        assert len(set(sentences)) == 4
        assert all(value in sentence for sentence in sentences for value in meaning.values())


def test_the_domains_share_no_name_value_or_sentence() -> None:
    restaurants, hotels = DOMAINS["restaurants"], DOMAINS["hotels"]
    values = [{value for slot in domain.values.values() for value in slot} for domain in (restaurants, hotels)]
    assert not values[0] & values[1]
    assert not set(restaurants.templates) & set(hotels.templates)
    assert set(restaurants.values) & set(hotels.values) == {"name", "area"}


def test_too_many_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "out", "hotels", "--rows", "1000000") == 2
    assert "use at most" in capsys.readouterr().err
    assert generate(tmp_path / "out", "hotels", "--rows", "0") == 2
    assert not (tmp_path / "out").exists()
