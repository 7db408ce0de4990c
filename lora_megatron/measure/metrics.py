# SPDX-License-Identifier: Apache-2.0
"""A JSON line a step in `metrics.jsonl`, one an evaluation in `evaluations.jsonl`; the same as TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from lora_megatron.measure.atomic import finite_or_null, write_text

METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
_EVENTS_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends to the two files in `folder`; every line is in its file before the call returns.

    enabled: only one rank writes; on the others every call does nothing.
    resumed_step: the step this run continues from. Lines of later steps (and a torn last line) are of a run that was
        killed after its last checkpoint; they are dropped, so that no step stands there twice. 0 starts afresh.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, resumed_step: int = 0) -> None:
        self._streams: dict[str, TextIO] = {}
        self._events: Any = None
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_NAME, EVALUATIONS_NAME):
                self._streams[name] = _open_lines(folder / name, resumed_step)
            self._events = _open_events(folder / _EVENTS_FOLDER, resumed_step)
        except BaseException:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def write(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Record `values` of `step`.

        A number that is not finite becomes null and adds `"finite": false`: a reader of strict JSON must not choke on
        the very line that tells why a run ended. Raises OSError when the disk is full.
        """
        self._append(METRICS_NAME, step, values)

    def write_evaluation(self, step: int, loss: float, measured: Mapping[str, float] | None = None) -> None:
        """Record the held-out loss after `step`, and by name what else was measured, as `write` does."""
        self._append(EVALUATIONS_NAME, step, {"held_out_loss": loss, **(measured or {})})

    def _append(self, name: str, step: int, values: Mapping[str, float | int | str | None]) -> None:
        if name not in self._streams:
            return
        line: dict[str, Any] = {"step": step, **finite_or_null(dict(values))}
        if any(isinstance(value, float) and not math.isfinite(value) for value in values.values()):
            line["finite"] = False
        self._streams[name].write(json.dumps(line, allow_nan=False) + "\n")
        self._streams[name].flush()
        if self._events is not None:
            for tag, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(tag, value, step)

    def close(self) -> None:
        """Close the files; further calls of `write` do nothing. Raises OSError when the disk is full."""
        streams, self._streams = self._streams, {}
        events, self._events = self._events, None
        with contextlib.ExitStack() as stack:
            if events is not None:
                stack.callback(events.close)
            for stream in streams.values():
                stack.callback(stream.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file as dictionaries; lines that were torn by a kill are skipped."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def _open_lines(path: Path, resumed_step: int) -> TextIO:
    """The file to append to, without the lines of steps after `resumed_step`."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step and resumed_step > 0]
        write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")


def _open_events(folder: Path, resumed_step: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None, flush_secs=10)
