# SPDX-License-Identifier: Apache-2.0
"""Folders that are written while something else goes on: threads, receipts, and what is published of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_megatron.checkpoint.background import Background, BackgroundFolder, Receipts
from lora_megatron.checkpoint.folder import Receipt, publish_folder, read_manifest, remove_folder, write_manifest
from lora_megatron.checkpoint.tensors import require_finite, save_tensors
from lora_megatron.errors import CheckpointError
from lora_megatron.parallel import groups
from lora_megatron.strict_safetensors import SafetensorsWriter
from tests.commands.runs import names_in

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A world of one process."""
    groups.join_world()
    yield
    groups.stop()


def test_a_thread_that_fails_says_so_to_whoever_asks() -> None:
    good, bad = Background(lambda: 7, name="good"), Background(lambda: {}["none"], name="bad")
    assert good.result() == 7
    bad.join()
    assert (good.state, bad.state) == ("whole", "failed")
    with pytest.raises(KeyError, match="none"):
        bad.result()


def test_the_receipt_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    receipt = save_tensors(path, TENSORS, {"format": "pt"})
    assert receipt == Receipt(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def test_the_hash_counts_what_a_short_write_has_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, [("a", torch.float32, (50,))], hashed=True) as writer:
        inner = writer._stream._stream.write
        writer._stream._stream = ShortWrites(inner)
        writer.write("a", torch.arange(50.0))
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


class ShortWrites:
    """A file that takes seven bytes at most."""

    def __init__(self, write: object) -> None:
        self._write = write

    def write(self, view: memoryview) -> int:
        return self._write(view[:7])  # type: ignore[operator]


def begin(final: Path, gate: threading.Event, *, fail: bool = False, one_writer: bool) -> BackgroundFolder:
    def write(temporary: Path) -> Receipts:
        gate.wait(60)
        if fail:
            raise OSError(28, "No space left on device")
        return {"a.safetensors": save_tensors(temporary / "a.safetensors", TENSORS, {})}

    def publish(temporary: Path, receipts: Receipts) -> None:
        publish_folder(temporary, final, {"kind": "test"}, receipts=receipts)

    return BackgroundFolder(final, write, publish, one_writer=one_writer)


@pytest.mark.parametrize("one_writer", [True, False])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, one_writer: bool) -> None:
    final, gate = tmp_path / "deep" / "name", threading.Event()
    folder = begin(final, gate, one_writer=one_writer)
    assert not folder.advance()
    assert (final.exists(), folder.seconds) == (False, None)
    assert [name.startswith(".tmp-name-") for name in names_in(final.parent)] == [True]
    gate.set()
    folder.wait()
    assert read_manifest(final)["kind"] == "test"
    assert names_in(final.parent) == ["name"]
    assert folder.advance()
    assert folder.seconds is not None
    with pytest.raises(CheckpointError, match="name exists already; nothing is overwritten"):
        begin(final, gate, one_writer=one_writer)


@pytest.mark.parametrize("one_writer", [True, False])
def test_a_failure_is_raised_where_it_is_looked_for_and_leaves_nothing(tmp_path: Path, one_writer: bool) -> None:
    final, gate = tmp_path / "name", threading.Event()
    folder = begin(final, gate, fail=True, one_writer=one_writer)
    assert not folder.advance()
    gate.set()
    with pytest.raises(CheckpointError, match=r"cannot write .*/name: No space left on device; free some space"):
        folder.wait()
    assert names_in(tmp_path) == []


def test_a_file_that_is_gone_or_not_as_large_as_its_receipt_is_not_sealed(tmp_path: Path) -> None:
    receipts = {"a.safetensors": save_tensors(tmp_path / "a.safetensors", TENSORS, {})}
    more = {**receipts, "b.safetensors": receipts["a.safetensors"]}
    with pytest.raises(CheckpointError, match=r"b\.safetensors was written and is gone"):
        write_manifest(tmp_path, {}, receipts=more)
    with (tmp_path / "a.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"a\.safetensors has \d+ bytes and \d+ were written"):
        write_manifest(tmp_path, {}, receipts=receipts)
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_folder_that_cannot_be_removed_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "a").touch()
    with monkeypatch.context() as patched:
        patched.setattr("os.rename", refuse)
        remove_folder(tmp_path / "name")
    assert names_in(tmp_path / "name") == ["a"]
    remove_folder(tmp_path / "name")
    assert names_in(tmp_path) == []


def refuse(*arguments: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("shape", [(), (3,), (40, 200_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_found_in_the_last_place_too(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    path, tensor = tmp_path / "a.safetensors", torch.zeros(shape, dtype=dtype)
    save_tensors(path, {"a": tensor, "i": torch.ones(2, dtype=torch.int64)}, {})
    require_finite(path)
    tensor.view(-1)[-1] = torch.inf
    save_tensors(path, {"a": tensor}, {})
    with pytest.raises(CheckpointError, match="a holds values that are not finite"):
        require_finite(path)
