# SPDX-License-Identifier: Apache-2.0
"""Our safetensors reader and writer against the official library, and against files that are not what they claim."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_megatron.errors import CheckpointError
from lora_megatron.strict_safetensors import DTYPES, SafetensorsFile, SafetensorsWriter, reader
from tests.safetensors_files import random_tensor, same, write


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"matrix.{name}": random_tensor(dtype, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {f"scalar.{name}": random_tensor(dtype) for name, dtype in DTYPES.items()}
    return tensors | {
        "empty": torch.empty(0, 7),
        "é\n\x01": torch.ones(1),
        "four": random_tensor(torch.bfloat16, 2, 3, 4, 5),
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One path for all the examples of a property."""
    return tmp_path_factory.mktemp("shared") / "a.safetensors"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of each read of a file."""
    found: list[tuple[int, int]] = []
    real = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        found.append((offset, sum(map(len, buffers))))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    return found


def test_the_official_library_reads_what_we_write(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", samples()
    metadata = {"format": "pt", "b": "2", "a": "é\n"}
    first = write(path, tensors, metadata)
    stored = load_file(path)
    assert set(stored) == set(tensors)
    assert all(same(stored[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == metadata
    assert first == write(path, tensors, dict(sorted(metadata.items())))
    assert first.index(b"matrix") > 8
    assert int.from_bytes(first[:8], "little") % 8 == 0


def test_we_read_what_the_official_library_writes(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", samples()
    save_file(tensors, path, metadata={"format": "pt"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.entries) == set(tensors)
        assert all(same(file.tensor(name)[:], tensors[name]) for name in tensors)
        assert path.read_bytes().startswith(file.header)
        starts = [entry.start for entry in file.entries.values()]
        assert starts == sorted(starts)
        with pytest.raises(CheckpointError, match="no tensor nowhere in"):
            file.tensor("nowhere")


def test_a_file_of_one_dtype_is_byte_for_byte_the_official_librarys(tmp_path: Path) -> None:
    tensors = {name: random_tensor(torch.float32, 3) for name in ("a", "b", 'é\x01\x7f"\\\n')}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert write(tmp_path / "ours", tensors, {"format": "pt"}) == (tmp_path / "theirs").read_bytes()


SHAPES = st.lists(st.integers(2, 5), max_size=4) | st.lists(st.integers(0, 3), max_size=4)
CUTS = st.tuples(st.integers(0, 2), st.integers(1, 6)).map(lambda cut: slice(*cut)) | st.just(slice(None))


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.lists(CUTS, max_size=4), st.sampled_from(list(DTYPES.values())))
def test_a_part_is_that_of_the_tensor(shared: Path, shape: list[int], cuts: list[slice], dtype: torch.dtype) -> None:
    tensor, where = random_tensor(dtype, *shape), tuple(cuts[: len(shape)])
    write(shared, {"before": torch.ones(3, dtype=torch.int8), "it": tensor, "after": torch.ones(1)})
    with SafetensorsFile(shared) as file:
        assert same(file.tensor("it")[where], tensor[where])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ((slice(None),), [(0, 96)]),
        ((slice(1, 3),), [(24, 48)]),
        ((slice(1, 3), slice(None), slice(0, 2)), [(24, 48)]),
        ((slice(None), slice(1, 2)), [(8, 8), (32, 8), (56, 8), (80, 8)]),
        ((slice(1, 2), slice(1, 3)), [(32, 16)]),
        ((slice(2, 4), slice(0, 2), slice(1, 2)), [(52, 4), (60, 4), (76, 4), (84, 4)]),
        ((slice(4, 9),), []),
    ],
)
def test_only_the_bytes_of_the_part_are_read(
    tmp_path: Path, reads: list[tuple[int, int]], where: tuple[slice, ...], expected: list[tuple[int, int]]
) -> None:
    tensor = torch.arange(24.0).view(4, 3, 2)
    write(tmp_path / "a", {"before": torch.ones(1), "it": tensor})
    with SafetensorsFile(tmp_path / "a") as file:
        assert reads[1:] == [(0, len(file.header))]
        reads.clear()
        assert same(file.tensor("it")[where], tensor[where])
        base = file.entries["it"].start
    assert reads == [(base + offset, count) for offset, count in expected]


def test_short_reads_go_on_and_a_file_cut_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensor, real = tmp_path / "a", torch.arange(100), os.preadv
    write(path, {"it": tensor})
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: real(descriptor, [buffers[0][:7]], at))
    with SafetensorsFile(path) as file:
        assert same(file.tensor("it")[:], tensor)
        os.truncate(path, path.stat().st_size - 3)
        for read in (file.tensor("it").__getitem__, lambda _: file.tensor("it").copy_to(io.BytesIO())):
            with pytest.raises(CheckpointError, match="truncated: it became shorter"):
                read(slice(None))


def test_samples_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK", 700)
    data = random_tensor(torch.uint8, 3000)
    tensors = {"big": data, "small": data[:10].clone(), "empty": data[:0]}
    whole = write(tmp_path / "a", tensors, {"k": "v"})
    raw = bytes(data.tolist())
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.tensor("big").sample(100) == raw[:100] + raw[1450:1550] + raw[-100:]
        assert file.tensor("small").sample(100) == file.tensor("small").sample(4) == raw[:10]
        assert file.tensor("empty").sample() == b""
        with SafetensorsWriter(tmp_path / "b", header=file.header) as writer:
            for name in file.entries:
                writer.write_raw(name, file.tensor(name))
    assert (tmp_path / "b").read_bytes() == whole


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"b": torch.ones(2)},
        {"a": torch.ones(3)},
        {"a": torch.ones(2).half()},
        {"a": torch.ones(2), "b": torch.ones(2)},
    ],
)
def test_the_writer_takes_only_what_was_announced(tmp_path: Path, given: dict[str, torch.Tensor]) -> None:
    def announce_and_write() -> None:
        with SafetensorsWriter(tmp_path / "a", [("a", torch.float32, (2,))]) as writer:
            for name, tensor in given.items():
                writer.write(name, tensor)

    with pytest.raises(AssertionError, match="a: "):
        announce_and_write()


@pytest.mark.parametrize(
    ("path", "words"), [("none/a", "No such file"), ("/dev/full", "No space left on device; free")]
)
def test_a_disk_that_refuses_is_named(tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot write .*{words}"):
        SafetensorsWriter(tmp_path / path, [])
