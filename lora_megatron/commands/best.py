# SPDX-License-Identifier: Apache-2.0
"""The best of a run so far in `best/`, in the form of what the run ends with, and what it takes to resume with it.

What another one displaces moves to `earlier_best/step-00000100/`, and stays there as long as there is a checkpoint at
which it was the best: a run that goes on from that checkpoint must have it back. A folder is always whole: each is
written under a hidden name and renamed, and so is what is displaced.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.adapter import save_adapter
from lora_megatron.checkpoint.base import save_model
from lora_megatron.checkpoint.folder import MANIFEST, disk_errors, fsync, read_manifest, remove_folder
from lora_megatron.checkpoint.state import checkpoints, step_of
from lora_megatron.commands.summary import Run
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.parallel.agree import gather_text, together
from lora_megatron.training.selection import Best

BEST_NAME = "best"
EARLIER_NAME = "earlier_best"
_STEP = re.compile(r"^step-\d{8}$")


def save_trained(run: Run, folder: Path, adapter_facts: dict[str, Any], **more: Any) -> None:
    """Write the adapter, or the whole model where that trains; collective. `more` goes into the manifest.

    Raises:
        CheckpointError, NumericalError: on all ranks; what was in `folder` before is untouched.
    """
    if run.method.trains_base:
        names = {"tokenizer": run.config.data.tokenizer, "tokenizer_fingerprint": run.tokenizer.fingerprint}
        save_model(folder, run.bare_chunks, run.base.shape, names, **more)
    else:
        save_adapter(folder, run.bare_chunks, run.method, run.base.shape, adapter_facts, **more)


def keep_best(run: Run, best: Best, adapter_facts: dict[str, Any]) -> None:
    """Make what is trained now `best/`; collective, while no checkpoint is being written.

    Raises:
        CheckpointError, NumericalError: on all ranks; the best until now is still there.
    """
    folder = Path(run.config.run.dir)
    candidate = _earlier_path(folder, best.step)
    save_trained(run, candidate, adapter_facts, best={"metric": run.config.train.best, **asdict(best)})

    def promote() -> None:
        with disk_errors(folder):
            _displace(folder)
            _rename(candidate, folder / BEST_NAME)
            drop_unneeded(folder, best)

    together(lambda: promote() if run.ranks.is_main else None)


def recall_best(run: Run, say: Callable[[str], None]) -> Best | None:
    """The best at the step where `run` goes on, which is `best/` again afterwards; collective.

    What became the best later is of a course no longer followed, and set aside aloud.

    Raises:
        ConfigError: it was chosen by something else than `train.best`.
        CheckpointError: a manifest is damaged, or the disk fails.
    """
    folder, config = Path(run.config.run.dir), run.config

    def rewind() -> str:
        with disk_errors(folder):
            found = _rewind(folder, run.trainer.step, config.train.best, say)
        return json.dumps(asdict(found) if found else None)

    text = together(lambda: rewind() if run.ranks.is_main else "")
    found = json.loads(gather_text(text)[0])
    return Best(**found) if found else None


def _rewind(folder: Path, step: int, metric: str, say: Callable[[str], None]) -> Best | None:
    current, earlier = folder / BEST_NAME, folder / EARLIER_NAME
    paths = [current, *(earlier.iterdir() if earlier.is_dir() else ())]
    found = [(*_read(path), path) for path in paths if path.is_dir() and (path == current or _STEP.match(path.name))]
    if metric == "none" and not found:
        return None
    for _, chosen_by, path in found:
        if metric not in ("none", chosen_by):
            raise ConfigError(
                f"{path} was chosen by train.best = {chosen_by}, and this is {metric}: keep that, or move it away"
            )
    for best, _, path in found:
        if best.step > step:
            earlier.mkdir(exist_ok=True)
            aside = earlier / f"superseded-step-{best.step:08d}-{uuid.uuid4().hex[:8]}"
            path.rename(aside)
            say(f"{path} is of step {best.step}, and the run goes on from step {step}: renamed to {aside}")
    left = [(best, path) for best, _, path in found if best.step <= step]
    if not left:
        return None
    best, path = max(left, key=lambda pair: pair[0].step)
    if path != current:
        _rename(path, current)
    return best if metric != "none" else None


def _read(path: Path) -> tuple[Best, str]:
    """The best evaluation that a folder is of, and what it was chosen by."""
    facts = read_manifest(path, verify=False).get("best")
    if not isinstance(facts, dict) or set(facts) != {"metric", "step", "value"}:
        raise CheckpointError(f"{path / MANIFEST} does not say what it was the best of: move {path} away")
    step, value = facts["step"], facts["value"]
    if type(step) is not int or type(value) not in (int, float):
        raise CheckpointError(f"{path / MANIFEST}: step {step!r} and value {value!r} are not numbers: move {path} away")
    return Best(step, float(value)), str(facts["metric"])


def _earlier_path(folder: Path, step: int) -> Path:
    return folder / EARLIER_NAME / f"step-{step:08d}"


def _displace(folder: Path) -> None:
    current = folder / BEST_NAME
    if current.is_dir():
        place = _earlier_path(folder, _read(current)[0].step)
        if place.is_dir():
            remove_folder(place)
        _rename(current, place)


def _rename(path: Path, to: Path) -> None:
    path.rename(to)
    fsync(path.parent)
    fsync(to.parent)


def drop_unneeded(folder: Path, best: Best) -> None:
    """Delete each displaced one that is the best at no checkpoint: none lies between it and what came after it."""
    saved = [step_of(path) for path in checkpoints(folder)]
    if not (folder / EARLIER_NAME).is_dir():
        return
    places = sorted(path for path in (folder / EARLIER_NAME).iterdir() if _STEP.match(path.name))
    steps = [*map(step_of, places), best.step]
    for place, (start, end) in zip(places, pairwise(steps), strict=True):
        if not any(start <= step < end for step in saved):
            remove_folder(place)
    if not any((folder / EARLIER_NAME).iterdir()):
        (folder / EARLIER_NAME).rmdir()
