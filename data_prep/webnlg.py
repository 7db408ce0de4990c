# SPDX-License-Identifier: Apache-2.0
"""WebNLG 2017: DBpedia triples to text, from the XML files of the challenge or from JSON files made of them.

    context  Aarhus | leaderName | Jacob_Bundsgaard
    target   The leader of Aarhus is Jacob Bundsgaard.
    meta     {"category": "Airport", "seen": true}

`test` holds all categories; `test_seen` and `test_unseen` the same rows by whether training has the category, which is
how the LoRA paper reports them. Only sentences that the authors marked good count. Triples are written as in `triples`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.json_records import read_json_array
from data_prep.options import add_options, prepare
from data_prep.raw_files import BadRecord
from data_prep.rows import LeftOut, Row, Source, as_object, checked_text, list_in, text_in
from data_prep.triples import WITHIN, linearise, rows_of
from data_prep.xml_entries import Element, read_xml
from lora_megatron.errors import DataError

FOLDERS = {"train": "train", "dev": "validation", "test": "test"}
SEEN = frozenset(
    ("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University")
) | {"WrittenWork"}
UNSEEN = frozenset(("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician"))
_ENGLISH = ("", "en")


def _rows(record: Any, number: int, split: str) -> list[Row]:
    entry = as_object(record)
    category = text_in(entry, "category")
    if category not in SEEN | UNSEEN:
        raise ValueError(f"category {category[:40]!r} is none of WebNLG 2017's fifteen")
    triples = [as_object(triple, "a triple") for triple in list_in(entry, "modifiedtripleset")]
    context = linearise([[text_in(triple, part) for part in ("subject", "property", "object")] for triple in triples])
    lexicalisations = [as_object(item) for item in list_in(entry, "lexicalisations")]
    sentences = [
        text_in(item, "lex").strip()
        for item in lexicalisations
        if text_in(item, "comment") == "good" and text_in(item, "lang", may_be_empty=True) in _ENGLISH
    ]
    if not sentences:
        raise LeftOut("without a sentence that is marked good")
    row_id = f"{category}/{text_in(entry, 'size')}/{text_in(entry, 'xml_id')}"
    seen = category in SEEN
    also_in = ("test_seen" if seen else "test_unseen",) if split == "test" else ()
    meta = json.dumps({"category": category, "seen": seen})
    return rows_of(row_id, context, sentences, meta=meta, also_in=also_in)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Entries of {"entries": [{"1": {...}}, ...]}."""
    for line, record in read_json_array(path, inside="entries"):
        if isinstance(record, BadRecord):
            yield line, record
        elif isinstance(record, dict) and len(record) == 1:
            yield line, next(iter(record.values()))
        else:
            yield line, BadRecord("an entry is not an object with one number")


def _read_xml(path: Path) -> Iterator[tuple[int, Any]]:
    """Entries of <benchmark><entries><entry>..., as the JSON files have them."""
    for line, element in read_xml(path, "entry"):
        try:
            yield line, _entry(element)
        except ValueError as error:
            yield line, BadRecord(str(error))


def _entry(element: Element) -> dict[str, Any]:
    triples = []
    for modified in element.find_all("mtriple"):
        parts = modified.text.split(WITHIN)
        if len(parts) != 3:
            raise ValueError(f"mtriple {modified.text[:80]!r} is not subject | property | object")
        triples.append(dict(zip(("subject", "property", "object"), parts, strict=True)))
    sentences = [
        {"comment": "", "lang": "", **lex.attributes, "lex": checked_text(lex.text, "lex")}
        for lex in element.find_all("lex")
    ]
    entry = {"modifiedtripleset": triples, "lexicalisations": sentences, **element.attributes}
    return {**entry, "xml_id": element.attributes.get("eid", "")}


def _files(raw: Path, name: str) -> list[Path]:
    """The files of `train`, `dev` or `test`: one of that name, or those of the challenge in a folder of that name."""
    for single in (raw / f"{name}.json", raw / f"{name}.xml"):
        if single.is_file():
            return [single]
    whole = raw / name / "testdata_with_lex.xml"
    if whole.is_file():  # what lies beside it are parts of it
        return [whole]
    return sorted(path for path in (raw / name).rglob("*.xml") if not path.stem.endswith("no_lex"))


def _source(split: str, path: Path) -> Source:
    read: Callable[[Path], Iterator[tuple[int, Any]]] = _read_json if path.suffix == ".json" else _read_xml
    return Source(split, path, records=lambda: read(path), rows=lambda record, number: _rows(record, number, split))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep webnlg`."""
    add_options(parser, raw="the challenge's folder with train/, dev/, test/, or one with train.json (.xml) and so on")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the WebNLG files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    raw: Path = arguments.raw
    sources = [_source(split, path) for name, split in FOLDERS.items() for path in _files(raw, name)]
    if not sources:
        raise DataError(
            f"{raw} has none of train, dev, test (a folder of XML files, .json or .xml); give another --raw"
        )
    prepare(arguments, sources, preparer="webnlg", with_meta=True)
