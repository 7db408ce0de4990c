# SPDX-License-Identifier: Apache-2.0
"""A folder that exists under its name only when it is complete.

All ranks write into a hidden `.tmp-<name>-<id>` beside it and fsync; then rank 0 hashes every file, writes
`manifest.json` last (with a hash of itself), fsyncs, and renames once. A kill at any moment leaves either the whole
folder or a temporary that nobody loads and the next save deletes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lora_megatron.errors import CheckpointError
from lora_megatron.parallel.agree import gather_text, together
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.strict_json import file_sha256, load_json_object

MANIFEST = "manifest.json"
_PREFIX = ".tmp-"
_OURS = (".safetensors", ".json")  # what a reader would take for content; a README beside them is nobody's business


@dataclass(frozen=True)
class Receipt:
    """What a file was when it was written: its entry in the manifest."""

    sha256: str
    bytes: int


def write_folder(
    final: Path,
    write: Callable[[Path], dict[str, Any]],
    *,
    finish: Callable[[Path], None] | None = None,
    replace: bool = False,
) -> None:
    """Write a folder with all ranks; collective.

    `write(temporary)` runs on every rank, writes this rank's files, and returns what the manifest shall say (rank 0's
    counts). Collectives that follow a write in it need a `together` of their own around that write, or a rank with a
    full disk leaves the others waiting. `finish(temporary)` then runs on rank 0 alone, when all files are there.
    `replace` allows a folder of that name to be there and swaps it for the new one.

    Raises:
        CheckpointError: on all ranks alike, when any rank failed (a full disk, a vanished directory) or the folder
            exists. The temporary is removed and what was there before is untouched.
    """
    temporary = temporary_of(final)

    def fill() -> dict[str, Any]:
        with disk_errors(final):
            return write(temporary)

    def publish() -> None:
        with disk_errors(final):
            if finish is not None:
                finish(temporary)
            publish_folder(temporary, final, facts)

    try:
        together(lambda: prepare_folder(final, temporary, replace=replace))
        facts = together(fill)
        together(lambda: publish() if dist.get_rank() == 0 else None)
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_of(final: Path) -> Path:
    """A hidden name beside `final` to write under, the same on all ranks; collective."""
    name = gather_text(uuid.uuid4().hex[:8] if dist.get_rank() == 0 else "")[0]
    return final.parent / f"{_PREFIX}{final.name}-{name}"


def prepare_folder(final: Path, temporary: Path, *, replace: bool = False) -> None:
    """On rank 0, make `temporary`, after whatever killed processes left beside it is gone.

    Raises:
        CheckpointError: `final` exists and shall not be replaced, or the place cannot be written.
    """
    if dist.get_rank() != 0:
        return
    with disk_errors(final):
        if final.exists() and not replace:
            raise CheckpointError(
                f"{final} exists already; nothing is overwritten: move it away or choose another run.dir"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        for stale in final.parent.glob(f"{_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()


def publish_folder(
    temporary: Path, final: Path, facts: dict[str, Any], *, receipts: Mapping[str, Receipt] | None = None
) -> None:
    """Seal `temporary`, whose files are all there and flushed, and give it its name in one step. OSError passes."""
    write_manifest(temporary, facts, receipts=receipts)
    fsync(temporary)
    if final.exists() and _exchange(temporary, final):
        shutil.rmtree(temporary, ignore_errors=True)  # what was there before
    elif final.exists():
        retired = _retired_name(final)
        os.rename(final, retired)
        os.rename(temporary, final)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.rename(temporary, final)
    fsync(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder that is whole so that a kill in between leaves no part of it under its name."""
    retired = _retired_name(folder)
    with contextlib.suppress(OSError):  # what cannot be deleted stays, and is whole
        os.rename(folder, retired)
        shutil.rmtree(retired, ignore_errors=True)


def _retired_name(final: Path) -> Path:
    return final.parent / f"{_PREFIX}{final.name}-retired-{uuid.uuid4().hex[:8]}"


def write_manifest(folder: Path, facts: dict[str, Any], *, receipts: Mapping[str, Receipt] | None = None) -> None:
    """Seal a folder whose files are all there: `facts`, and size and SHA-256 of every file.

    A file with a receipt is not read again.

    Raises:
        CheckpointError: a file with a receipt is missing or of another size.
    """
    known, files = receipts or {}, {}
    for path in sorted(folder.iterdir()):
        receipt = known.get(path.name) or Receipt(
            file_sha256(path, CheckpointError, progress=beat), path.stat().st_size
        )
        if path.stat().st_size != receipt.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and {receipt.bytes} were written")
        files[path.name] = asdict(receipt)
    if lost := sorted(set(known) - set(files)):
        raise CheckpointError(f"cannot write {folder}: {lost[0]} was written and is gone; choose another run.dir")
    manifest = {"format": 1, **facts, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _manifest_sha256(manifest)})


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step, where system and file system can; False where not."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that `path` could not be written: a full disk is the user's to mend, not a traceback."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "free some space or choose another run.dir")
        where = error.filename if error.errno in _REMEDIES and error.filename else path
        raise CheckpointError(f"cannot write {where}: {reason}; {remedy}") from error


_IN_THE_WAY = "move away what is there or choose another run.dir"
_REMEDIES = {
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter run.dir",
}


def read_manifest(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a complete folder, every file checked against its size and SHA-256 unless `verify` is off.

    Raises:
        CheckpointError: no manifest, an altered one, a missing, extra, resized or altered file; the message names it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    manifest = load_json_object(folder / MANIFEST, f"the manifest of a complete {folder.name}", CheckpointError)
    stored = manifest.pop("sha256", None)
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of format 1; it was written by another version")
    if stored != _manifest_sha256(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its content is not what its own sha256 says")
    for path in sorted(folder.iterdir()):
        if path.suffix in _OURS and path.name not in files and path.name != MANIFEST:
            raise CheckpointError(f"{path} is not listed in the manifest beside it; move it elsewhere")
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise CheckpointError(f"{folder / MANIFEST}: bad file entry {name!r}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing although the manifest lists it")
        if path.stat().st_size != entry.get("bytes"):
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}")
        if verify:
            verify_file(folder, manifest, name)
    return manifest


def verify_file(folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Raise CheckpointError unless the content of this file is what the manifest says."""
    if file_sha256(folder / name, CheckpointError, progress=beat) != manifest["files"][name]["sha256"]:
        raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON and fsync it."""
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def fsync(path: Path) -> None:
    """Flush a file's content or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
