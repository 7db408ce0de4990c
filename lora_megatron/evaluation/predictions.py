# SPDX-License-Identifier: Apache-2.0
"""`predictions.jsonl`: a line for each row, in their order, appended as they come; and what they are predictions of.

`evaluation.json` beside it holds the settings and the fingerprints of model and data. Lines of one evaluation are never
continued by another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.evaluation.answering import Answer
from lora_megatron.measure.atomic import write_json
from lora_megatron.measure.report_folder import require_no_file
from lora_megatron.strict_json import NotStrictJson, load_json_object, parse_json

PREDICTIONS, IDENTITY, SCORES = "predictions.jsonl", "evaluation.json", "scores.json"


def require_free(folder: Path, identity: dict[str, Any]) -> None:
    """Raise unless `folder` is absent, empty, or holds an evaluation with this very identity.

    Raises:
        ConfigError: it is a file, holds something else, or another evaluation; the message says what differs.
        CheckpointError: its `evaluation.json` is damaged.
    """
    require_no_file(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if not name.startswith(".")]  # locks and temporaries of a killed one
    if IDENTITY not in names:
        if names:
            raise ConfigError(f"--out {folder} holds {names[0]} and is no evaluation's: choose another folder")
        return
    there = load_json_object(folder / IDENTITY, "what an evaluation is of", CheckpointError)
    for name in sorted({*there, *identity}):
        if there.get(name) != identity.get(name):
            raise ConfigError(
                f"--out {folder} holds another evaluation: {name} is {_shown(there.get(name))} there and "
                f"{_shown(identity.get(name))} here: choose another folder, or give the settings of that one"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


class PredictionLog:
    """The predictions of one evaluation, which go on after the last whole line; `ids` are those of all rows.

    Raises:
        CheckpointError: a line that is damaged, or of another row than belongs there.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], ids: Sequence[str]) -> None:
        self.path, self._ids = folder / PREDICTIONS, ids
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # what a kill has torn is written anew
        self.answers = [self._parse(number, line) for number, line in enumerate(whole.split(b"\n")[:-1])]
        if not (folder / IDENTITY).exists():
            write_json(folder / IDENTITY, identity)
        self._file = open(self.path, "ab")  # noqa: SIM115  # closed by `close`
        if len(whole) < len(content):
            self._file.truncate(len(whole))

    def append(self, answers: Sequence[Answer]) -> None:
        """Add the answers to the next rows, and see them onto the disk."""
        first = len(self.answers)
        lines = [
            json.dumps({"id": self._ids[first + i], **answer}, ensure_ascii=False, allow_nan=False) + "\n"
            for i, answer in enumerate(answers)
        ]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers += answers

    def close(self) -> None:
        """Nothing is added afterwards."""
        self._file.close()

    def _parse(self, number: int, line: bytes) -> Answer:
        problem = "cannot be read"
        try:
            answer = parse_json(line.decode())
        except (UnicodeDecodeError, json.JSONDecodeError, NotStrictJson, RecursionError):
            answer = None
        if isinstance(answer, dict) and isinstance(answer.get("prediction"), str):
            wanted = self._ids[number] if number < len(self._ids) else None
            if answer.pop("id", None) == wanted is not None:
                return answer
            problem = f"is not of row {wanted}" if wanted is not None else "is more than there are rows"
        raise CheckpointError(f"{self.path}: line {number + 1} {problem}: delete the file to predict anew")
