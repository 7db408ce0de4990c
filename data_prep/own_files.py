# SPDX-License-Identifier: Apache-2.0
"""Users' own data: JSON Lines (or one JSON array) and CSV files, in the shapes of `data_prep.shapes`.

--raw is a file, which is `train`, or a folder with train, validation (valid, val, dev) and test; --split names files
singly. A row's id is the column `id`, or else file and line, such as `train.jsonl:17`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.chat_template import ChatTemplate
from data_prep.csv_records import read_csv, read_header
from data_prep.json_records import read_json_array, read_json_lines
from data_prep.options import add_options, files_of_splits, prepare
from data_prep.raw_files import BadRecord
from data_prep.rows import Row, Source, as_object, checked_text
from data_prep.shapes import SHAPES, Shape, prompt_and_completion, shape_of
from lora_megatron.errors import ConfigError, DataError

STEMS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HELD_OUT = "validation"
Records = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class FileFormat:
    """A way to write records: its files' endings, the columns of a file, and its records with them."""

    name: str
    suffixes: tuple[str, ...]
    columns: Callable[[Path], Sequence[str]]
    records: Callable[[Path, Sequence[str]], Records]


def _read_json(path: Path, columns: Sequence[str] = ()) -> Records:
    try:
        with open(path, "rb") as stream:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return read_json_array(path) if start == b"[" else read_json_lines(path)


def _json_columns(path: Path) -> Sequence[str]:
    """The keys of the first record that is an object, so that one bad line does not hide what the file is."""
    problem = ""
    for line, record in _read_json(path):
        if isinstance(record, Mapping):
            return tuple(record)
        problem = problem or f":{line}: {record.reason if isinstance(record, BadRecord) else 'not an object'}"
    raise DataError(
        f"{path}{problem or ': blank lines'}, and no record follows: give JSON objects, one a line, in UTF-8"
    )


JSON = FileFormat("JSON Lines", (".jsonl", ".json"), _json_columns, _read_json)


def _csv(delimiter: str) -> FileFormat:
    def records(path: Path, columns: Sequence[str]) -> Records:
        for line, values in read_csv(path, columns, delimiter=delimiter):
            yield line, values if isinstance(values, BadRecord) else dict(zip(columns, values, strict=True))

    return FileFormat("CSV", (".csv", ".tsv"), partial(read_header, delimiter=delimiter), records)


def sources_of(
    files: Sequence[tuple[str, Path]],
    form: FileFormat,
    *,
    shape: Shape | None = None,
    id_column: str | None = None,
    template: ChatTemplate | None = None,
    held_out: float | None = None,
) -> list[Source]:
    """The sources of (split, path) pairs.

    shape, id_column: what the columns are called, if not by the names of `SHAPES` and `id`. held_out: the share of
    train's rows that go to `validation`, drawn by their ids.

    Raises DataError for a file whose columns are none of the shapes.
    """
    names = [path.name for _, path in files]
    sources = []
    for split, path in sorted(files, key=lambda file: file[0]):
        label = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        source = _source(split, path, form, shape=shape, id_column=id_column, template=template, label=label)
        sources.append(_with_held_out(source, held_out) if split == "train" and held_out else source)
    return sources


def _source(
    split: str,
    path: Path,
    form: FileFormat,
    *,
    shape: Shape | None,
    id_column: str | None,
    template: ChatTemplate | None,
    label: str,
) -> Source:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; give {form.name} files")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: give a {form.name} file with records")
    columns = form.columns(path)
    shape = shape or shape_of(columns)
    if shape is None or not {*shape.needs, *((id_column,) if id_column else ())} <= set(columns):
        expected = " or ".join("+".join(known.needs) for known in ((shape,) if shape else SHAPES))
        expected += f", and {id_column}" if id_column else ""
        raise DataError(
            f"{path} has the columns {', '.join(map(repr, columns))[:300]}; expected {expected}; "
            "give yours as --prompt-column and --completion-column (and --id-column)"
        )
    wanted = [*shape.needs, *(name for name in (*shape.may_have, id_column or "id") if name in columns)]
    known_shape = shape

    def records() -> Records:
        for line, record in form.records(path, wanted):
            yield line, record if isinstance(record, BadRecord) else (line, record)

    def rows(numbered: tuple[int, Any], _: int) -> list[Row]:
        line, record = numbered[0], as_object(numbered[1])
        context, target = known_shape.texts(record, template)
        return [Row(_id(record, id_column, f"{label}:{line}"), context, target, [target])]

    return Source(split, path, records, rows)


def _id(record: Mapping[str, Any], column: str | None, otherwise: str) -> str:
    value = record.get(column or "id")
    if value is None and column is None:
        return otherwise
    # `type is`: JSON's true is an int to Python.
    return checked_text(str(value) if type(value) is int else value, column or "id")


def _with_held_out(source: Source, share: float) -> Source:
    def rows(record: Any, number: int) -> list[Row]:
        return [replace(row, split=HELD_OUT) if _drawn(row.id, share) else row for row in source.rows(record, number)]

    return replace(source, rows=rows, more_splits=(HELD_OUT,))


def _drawn(row_id: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8")).digest()[:8], "big") < share * 2**64


def _files(arguments: argparse.Namespace, form: FileFormat) -> list[tuple[str, Path]]:
    raw: Path | None = arguments.raw
    if (raw is None) == (not arguments.split):
        raise ConfigError("give either --raw FILE_or_FOLDER or --split NAME=FILE, once or more often")
    if raw is None:
        return [_named(text) for text in arguments.split]
    if raw.is_file():
        return [("train", raw)]
    names = {stem + suffix: split for stem, split in STEMS.items() for suffix in form.suffixes}
    return files_of_splits(raw, names, what=f"{form.name} files, or a file itself")


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not path or not SPLIT_NAME.fullmatch(name):
        raise ConfigError(f"--split {text!r} is not NAME=FILE with a name of letters, digits, - and _")
    return name, Path(path)


def _shape(arguments: argparse.Namespace) -> Shape | None:
    prompt, completion = arguments.prompt_column, arguments.completion_column
    if prompt is None and completion is None:
        return None
    if prompt == completion:
        raise ConfigError(f"--prompt-column and --completion-column are both {prompt!r}")
    return prompt_and_completion(prompt or "prompt", completion or "completion")


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; write YYYY-MM-DD") from None


def _add_arguments(parser: argparse.ArgumentParser, suffix: str) -> None:
    names = ", ".join(f"{stem}{suffix}" for stem in ("train", "validation", "test"))
    add_options(parser, raw=f"a file, which is train; or a folder with {names} (any of them)", raw_required=False)
    flag = parser.add_argument
    flag("--split", action="append", default=[], metavar="NAME=FILE", help="instead of --raw; several make several")
    flag("--prompt-column", metavar="NAME", help="the column of contexts (default: by the columns there are)")
    flag("--completion-column", metavar="NAME", help="the column of targets")
    flag("--id-column", metavar="NAME", help="default: id if there is one, else file and line")
    flag("--validation-fraction", type=float, metavar="F", help="this share of train goes to validation, drawn by id")
    flag("--chat-template", type=Path, metavar="FOLDER", help="render messages as this tokenizer's folder has it")
    flag("--date", type=_date, metavar="YYYY-MM-DD", help="what a chat template is told that asks for today's date")


def add_jsonl_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep jsonl`."""
    _add_arguments(parser, ".jsonl")


def add_csv_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep csv`."""
    _add_arguments(parser, ".csv")
    parser.add_argument("--delimiter", default=",", help="one character, or 'tab' (default: a comma)")


def run_jsonl(arguments: argparse.Namespace) -> None:
    """Prepare the JSON Lines files that the flags name into `arguments.out`. Raises ConfigError or DataError."""
    _run(arguments, JSON, preparer="jsonl", more_options={})


def run_csv(arguments: argparse.Namespace) -> None:
    """Prepare the CSV files that the flags name into `arguments.out`. Raises ConfigError or DataError."""
    delimiter = "\t" if arguments.delimiter == "tab" else arguments.delimiter
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ConfigError(f"--delimiter {arguments.delimiter!r} must be one character, or tab, and no quote")
    _run(arguments, _csv(delimiter), preparer="csv", more_options={"delimiter": delimiter})


def _run(arguments: argparse.Namespace, form: FileFormat, *, preparer: str, more_options: dict[str, Any]) -> None:
    files, held_out = _files(arguments, form), arguments.validation_fraction
    if held_out is not None:
        if not 0 < held_out < 1:
            raise ConfigError(f"--validation-fraction {held_out} must be above 0 and below 1")
        if HELD_OUT in dict(files) or arguments.low_data is not None:
            raise ConfigError("--validation-fraction goes with neither a validation file nor --low-data")
    if arguments.date and arguments.chat_template is None:
        raise ConfigError(f"--date {arguments.date} is for a chat template: give --chat-template as well")
    template = ChatTemplate(arguments.chat_template, date=arguments.date) if arguments.chat_template else None
    sources = sources_of(
        files, form, shape=_shape(arguments), id_column=arguments.id_column, template=template, held_out=held_out
    )
    for name in ("prompt_column", "completion_column", "id_column", "validation_fraction", "date"):
        value = vars(arguments)[name]
        more_options |= {name: str(value) if name == "date" else value} if value is not None else {}
    tokenizer = template.tokenizer if template else None
    prepare(arguments, sources, preparer=preparer, more_options=more_options, rendered_for=tokenizer)
