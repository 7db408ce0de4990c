# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it, who may write into it, and where a run resumes."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.folder import disk_errors
from lora_megatron.checkpoint.state import (
    Progress,
    checkpoint_path,
    checkpoints,
    newest_good,
    read_progress,
    set_aside_newer,
    step_of,
)
from lora_megatron.commands.run_lock import LOCK_NAME, RunLock
from lora_megatron.config import Config
from lora_megatron.errors import CheckpointError, ConfigError, LostRankError, Preempted, UserError
from lora_megatron.measure.atomic import write_json, write_json_even_if_full, write_text
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.html_report import write_html_report
from lora_megatron.measure.metrics import METRICS_NAME
from lora_megatron.parallel.agree import gather_text, is_main
from lora_megatron.parallel.launcher import restart_count
from lora_megatron.parallel.watchdog import BEATS_NAME

_STATUS = "status.json"
_STATES = ("running", "done", "failed", "preempted")
_TRACE = re.compile(rf"{re.escape(LOCK_NAME)}$|{re.escape(BEATS_NAME)}$|\.{re.escape(_STATUS)}\..*\.tmp$")


def claim(config: Config, *, restarted: bool = False) -> RunLock:
    """Make the folder and hold its lock. Refuse one that holds a run already, unless the run shall resume, or is the
    same one, which torchrun has `restarted`.

    A folder in which a run failed before it began (it holds no more than its status) is free.

    Raises:
        ConfigError: another job runs in it; it is a file; it is not empty and the run starts afresh or from a
            checkpoint outside of it, or `auto` finds neither a checkpoint nor a run's status there.
        CheckpointError: it cannot be made, or the checkpoint to resume from is no folder.
    """
    folder = Path(config.run.dir)
    with disk_errors(folder):
        if not (restarted or (folder / LOCK_NAME).exists()):
            _require_free(folder, config.run.resume)  # before a lock is written into what may be anybody's
        lock = RunLock(folder)
        try:
            if not restarted:
                _require_free(folder, config.run.resume)
        except BaseException:
            lock.release()
            raise
    return lock


def _require_free(folder: Path, resume: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir = {folder} is a file; choose a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    has_status = _STATUS in names and _is_ours(folder)
    # What a run leaves that was killed before its first status is nobody's work.
    names = [name for name in names if not (_TRACE.match(name) or (name == _STATUS and has_status))]
    if resume not in ("never", "auto"):
        _require_checkpoint_of(folder if names else None, resume)
    elif names and resume == "never":
        raise ConfigError(
            f"run.dir = {folder} holds a run already: choose another run.dir, or set run.resume=auto to continue it"
        )
    elif names and not has_status and not checkpoints(folder):
        raise ConfigError(
            f"run.dir = {folder} holds {names[0]} and neither a checkpoint nor the status.json of a run: choose "
            "another run.dir, or move away what is there"
        )


def _require_checkpoint_of(run: Path | None, resume: str) -> None:
    """`resume` is a folder, in `run` unless that is None."""
    if run is not None and Path(resume).resolve().parent.parent != run.resolve():
        raise ConfigError(
            f"run.dir = {run} holds a run already, and run.resume = {resume} is not of that run: choose another run.dir"
        )
    if not Path(resume).is_dir():
        raise CheckpointError(f"run.resume = {resume} is neither never, nor auto, nor the folder of a checkpoint")


def _is_ours(folder: Path) -> bool:
    return _old_status(folder).get("state") in _STATES


def resume_if_restarted(config: Config, launchers: list[str]) -> tuple[Config, bool]:
    """The configuration, and whether torchrun restarted this very run: then it goes on from its own newest checkpoint,
    whatever `run.resume` says. Collective.

    A torchrun stays the same process over its restarts, so a launcher that began the run and is here settles it.
    """
    if restart_count() == 0:
        return config, False
    folder, found = Path(config.run.dir), ""
    if is_main() and set(launchers) & set(_old_status(folder).get("launchers", ())):
        found = "checkpoints" if checkpoints(folder) else "none saved"
    found = gather_text(found)[0]
    resume = config.run.resume if found != "checkpoints" else "auto"
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": resume})}), bool(found)


def _old_status(folder: Path) -> dict[str, Any]:
    try:
        status = json.loads((folder / _STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def find_checkpoint(
    config: Config, identity: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path, Progress] | None:
    """The checkpoint to resume from, None for a fresh start; damaged ones are passed over aloud.

    Raises:
        CheckpointError: the named checkpoint is damaged or another run's.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return newest_good(Path(config.run.dir), identity, say)
    folder = Path(config.run.resume)
    return folder, read_progress(folder, identity)


def begin(config: Config, step: int, launchers: list[str], say: Callable[[str], None]) -> None:
    """Write the status `running`, the resolved configuration and the environment.

    A run that goes on from `step` sets newer checkpoints aside.
    """
    folder = Path(config.run.dir)
    set_status(config, "running", step=step, launchers=launchers)
    if step:
        set_aside_newer(folder, step, say)
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "environment.json", describe_environment())


def set_status(config: Config, state: str, **facts: Any) -> None:
    """status.json: running, done, failed or preempted; over the old one if the disk is full.

    The launchers of the run stay in it.
    """
    folder = Path(config.run.dir)
    launchers = {"launchers": _old_status(folder).get("launchers", [])}
    status = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **launchers, **facts}
    write_json_even_if_full(folder / _STATUS, status)


@contextlib.contextmanager
def ending_recorded(config: Config, *, enabled: bool) -> Iterator[None]:
    """status.json says `failed`, why and with which exit status, when an exception passes through; or `preempted`.

    enabled: on the rank that writes. Where contact with a rank is lost it may be that one: then whoever is left writes,
    unless the reason stands there already.
    """
    folder = Path(config.run.dir)
    try:
        yield
    except Preempted as preempted:
        if preempted.step is None:  # while starting: where it would have gone on
            preempted.step = step_of(checkpoints(folder)[0]) if checkpoints(folder) else 0
        saved = checkpoint_path(folder, preempted.step)
        preempted.saved = str(saved) if saved.is_dir() else None
        facts = {"step": preempted.step, "signal": preempted.signal, "message": str(preempted)}
        if enabled:
            with contextlib.suppress(OSError):
                set_status(config, "preempted", exit_status=preempted.exit_status, **facts)
                _show(folder)
        raise
    except Exception as error:  # whatever it is, it is recorded and goes on
        is_lost = isinstance(error, LostRankError) and _old_status(folder).get("state") == "running"
        if enabled or is_lost:
            with contextlib.suppress(OSError):  # the folder itself may be gone
                set_status(config, "failed", exit_status=getattr(error, "exit_status", 1), error=str(error))
                _show(folder)
        raise


def _show(folder: Path) -> None:
    """report.html of what there is, once there is anything; a folder with no more than a status stays free."""
    if (folder / METRICS_NAME).is_file():
        with contextlib.suppress(UserError):  # a damaged log is no reason to hide why the run ended
            write_html_report(folder)
