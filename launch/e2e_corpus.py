# SPDX-License-Identifier: Apache-2.0
"""The data of `launch/e2e_experiment.py`: E2E split by meaning representation, and a corpus to pretrain on.

    raw/e2e         devset.csv as train and validation (no meaning representation in both), the test set as it is
    data/e2e        of that, by `data_prep e2e`
    data/corpus     one text a row, by `data_prep jsonl`: contexts and sentences of WebNLG's and DART's development
                    sets, and the bare sentences of E2E's training part

No sentence of E2E's test set is in the corpus, and of E2E's development set none but those: DART's development set has
most of E2E's within, also of its validation part. What is held out of the corpus shares no context with what is trained
on, and its bare sentences are E2E's validation part.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.csv_records import read_csv
from data_prep.raw_files import BadRecord
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import DataError
from lora_megatron.measure.atomic import write_text

E2E_DEV, E2E_TEST = "e2e/devset.csv", "e2e/testset_w_refs.csv"
WEBNLG, DART = "webnlg/dev.json", "dart/dart-v1.1.1-full-dev.json"
TOKENIZER = "gpt2_bpe"
RAW_FILES = (E2E_DEV, E2E_TEST, WEBNLG, DART, f"{TOKENIZER}/encoder.json", f"{TOKENIZER}/vocab.bpe")
HELD_OUT_SHARE = 0.1
COLUMNS = ("mr", "ref")

Preparer = Callable[..., None]
"""Runs `python -m data_prep` with these arguments."""
_NO_WORD = re.compile(r"\W+")


def require_raw(raw: Path) -> None:
    """Raise DataError for the first of the raw files that is not there."""
    for name in RAW_FILES:
        if not (raw / name).is_file():
            raise DataError(f"--raw {raw} has no {name}: give the folder that has {', '.join(RAW_FILES)}")


def prepare(raw: Path, out: Path, *, prepare_by: Preparer, rows: int | None) -> dict[str, Any]:
    """Write out/raw and out/data anew, at most `rows` rows a file, and return what a report says of them.

    Raises DataError for a raw file that cannot be read, or where a sentence would leak from the test set.
    """
    for name in ("raw", "data"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir()
    parts = _split_e2e(raw, out / "raw" / "e2e")
    for source, folder in ((WEBNLG, "webnlg"), (DART, "dart")):
        (out / "raw" / folder).mkdir()
        shutil.copyfile(raw / source, out / "raw" / source)
    limit = [] if rows is None else ["--limit", str(rows)]
    for task in ("e2e", "webnlg", "dart"):
        prepare_by(task, "--raw", str(out / "raw" / task), "--out", str(out / "data" / task), *limit)
    facts = _write_corpus(out, parts, rows=rows)
    prepare_by("jsonl", "--raw", str(out / "raw" / "corpus"), "--out", str(out / "data" / "corpus"))
    return facts


def held_out(key: str) -> bool:
    """Whether what has this meaning representation or context is held out: a function of the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def plain(text: str) -> str:
    """What two spellings of a sentence have in common: letters and digits in lower case."""
    return _NO_WORD.sub(" ", text.lower()).strip()


def _split_e2e(raw: Path, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(mr, ref) of the training, validation and test parts, written as the challenge names its files."""
    folder.mkdir()
    pairs = _read_pairs(raw / E2E_DEV)
    parts = {
        "train": [pair for pair in pairs if not held_out(pair[0])],
        "validation": [pair for pair in pairs if held_out(pair[0])],
        "test": _read_pairs(raw / E2E_TEST),
    }
    _write_pairs(folder / "trainset.csv", parts["train"])
    _write_pairs(folder / "devset.csv", parts["validation"])
    shutil.copyfile(raw / E2E_TEST, folder / Path(E2E_TEST).name)
    return parts


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for line, record in read_csv(path, COLUMNS):
        if isinstance(record, BadRecord):
            raise DataError(f"{path}:{line}: {record.reason}")
        pairs.append((record[0], record[1]))
    return pairs


def _write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([COLUMNS, *pairs])


def _write_corpus(out: Path, parts: dict[str, list[tuple[str, str]]], *, rows: int | None) -> dict[str, Any]:
    tested = {plain(ref) for _, ref in parts["test"]}
    known = {plain(ref) for part in parts.values() for _, ref in part}
    webnlg = list(_texts(out / "data" / "webnlg"))
    dart = list(_texts(out / "data" / "dart"))
    taken = [*_new(webnlg, known), *_new(dart, known)]
    texts = [(context, f"{context}\n{sentence}") for context, sentence in taken]
    for part in ("train", "validation"):  # sentences alone: what they express is left to adaptation
        sentences = dict.fromkeys(ref.strip() for _, ref in parts[part] if ref.strip())
        texts += [(part, sentence) for sentence in sentences]
    files: dict[str, list[str]] = {"train": [], "validation": []}
    for key, text in texts:
        files[key if key in files else "validation" if held_out(key) else "train"].append(text)
    (out / "raw" / "corpus").mkdir()
    for name, lines in files.items():
        _require_clean(lines, tested)
        kept = _spread(lines, rows)
        write_text(out / "raw" / "corpus" / f"{name}.jsonl", "".join(json.dumps({"text": x}) + "\n" for x in kept))
    return {
        "e2e_pairs": {name: len(part) for name, part in parts.items()},
        "e2e_meaning_representations": {name: len({mr for mr, _ in part}) for name, part in parts.items()},
        "left_out_of_webnlg_and_dart": len(webnlg) + len(dart) - len(taken),
        "corpus_texts": {name: len(lines) if rows is None else min(rows, len(lines)) for name, lines in files.items()},
    }


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for _, context, target in open_examples(folder / "validation.parquet"):
        yield context, target


def _new(texts: Iterable[tuple[str, str]], known: set[str]) -> Iterator[tuple[str, str]]:
    """Those whose sentence is not known yet; it is from then on."""
    for context, sentence in texts:
        if plain(sentence) not in known:
            known.add(plain(sentence))
            yield context, sentence


def _spread(lines: Sequence[str], rows: int | None) -> list[str]:
    """`rows` of the lines, from all over them."""
    count = len(lines) if rows is None else min(rows, len(lines))
    return [lines[index * len(lines) // count] for index in range(count)]


def _require_clean(texts: Iterable[str], tested: set[str]) -> None:
    for text in texts:
        if plain(text.rpartition("\n")[2]) in tested:
            raise DataError(f"the pretraining corpus would have a sentence of E2E's test set: {text[-80:]!r}")
