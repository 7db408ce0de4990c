# SPDX-License-Identifier: Apache-2.0
"""Files that are not what they claim: refused in one line, or read exactly as the official library reads them."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_megatron.errors import CheckpointError
from lora_megatron.strict_safetensors import SafetensorsFile
from tests.safetensors_files import Tree, check, put, write

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One path for all the examples of a property."""
    return tmp_path_factory.mktemp("shared") / "a.safetensors"


def entry(**changes: Any) -> Tree:
    return {"a": {**ONE, **changes}}


def two(first: list[int], second: list[int]) -> Tree:
    sizes = [[(stop - start) // 4] for start, stop in (first, second)]
    pairs = zip(sizes, (first, second), strict=True)
    return {name: {"dtype": "F32", "shape": n, "data_offsets": at} for name, (n, at) in zip("ab", pairs, strict=True)}


HEADERS: list[tuple[Tree | bytes | str, str]] = [
    (b'{"\xff": 1}', "not UTF-8"),
    ('{"a": 1', "not valid JSON"),
    ('{"a":' * 100_000, "nested too deeply"),
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "a number that is too long"),
    ('{"a": NaN}', "strict JSON: it contains NaN"),
    (f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}', "'a' appears twice"),
    ("[1]", "not a JSON object"),
    (' {"a": 1}', "not a JSON object"),
    ({"__metadata__": {"a": 1}}, "__metadata__ is not a map of strings"),
    ({"__metadata__": None}, "__metadata__ is not a map of strings"),
    ({"__metadata__": {"a": "\ud800"}}, "__metadata__ is not a map of strings"),
    ({"\udfff": ONE}, "not Unicode"),
    ({"a": 1}, "the fields of 'a'"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "the fields of 'a'"),
    (entry(more=1), "the fields of 'a'"),
    (entry(dtype="F33"), "unknown dtype 'F33'"),
    (entry(dtype=["F32"]), "dtype of 'a' is not a string"),
    (entry(shape=2), "shape of 'a' is not a list"),
    (entry(shape=[2.0]), "shape of 'a' is not a list"),
    (entry(shape=[2, True]), "shape of 'a' is not a list"),
    (entry(shape=[-2]), "shape of 'a' is not a list"),
    (entry(shape=[2] + [1] * 8), "9 dimensions"),
    (entry(shape=[2**40, 2**40]), "absurd shape"),
    (entry(shape=[0, 2**63], data_offsets=[0, 0]), "absurd shape"),
    (entry(data_offsets=[0, 8, 9]), "data_offsets of 'a' are not two"),
    (entry(data_offsets=[False, 8]), "data_offsets of 'a' are not two"),
    (entry(data_offsets=[8, 0]), "data_offsets of 'a' are not in order"),
    (entry(data_offsets=[-8, 0]), "data_offsets of 'a' are not in order"),
    (entry(data_offsets=[0, 7]), "length of the data of 'a' is not the 8 bytes"),
    (entry(shape=[1]), "length of the data of 'a' is not the 4 bytes"),
    (json.dumps(entry()).replace("[0,", "[-0,"), "negative"),
    (two([0, 8], [4, 8]), "overlap between the data of 'a' and of 'b'"),
    (two([0, 4], [0, 8]), "overlap between the data of 'a' and of 'b'"),
    (two([0, 0], [4, 8]), "hole between the data of 'a' and of 'b'"),
    (two([4, 8], [8, 8]), "hole between the data of the header and of 'a'"),
    (entry(shape=[3], data_offsets=[0, 12]), "truncated: .* describes"),
    (entry(shape=[1], data_offsets=[0, 4]), "data after its last tensor"),
    ({}, "data after its last tensor"),
]  # fmt: skip


def refusal(path: Path) -> str:
    """What we say of a file that we must refuse, in one line; no handle stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert len(os.listdir("/proc/self/fd")) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert str(path) in message
    return message


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Tree | bytes | str, words: str) -> None:
    message = refusal(put(tmp_path / "a", header, bytes(8)))
    assert message.startswith(f"{tmp_path / 'a'} is not a readable safetensors file: ")
    assert re.search(words, message), message


@pytest.mark.parametrize("damage", [False, True])
def test_the_same_headers_without_a_defect_are_read(tmp_path: Path, damage: bool) -> None:
    for header in (entry(), two([0, 4], [4, 8]), two([4, 8], [0, 4]), two([0, 0], [0, 8])):
        path = put(tmp_path / "a", header, bytes(8 - damage))
        if damage:
            assert "truncated" in refusal(path)
        else:
            assert check(path)


def test_a_wrong_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for size in range(8):
        path.write_bytes(bytes(size))
        assert f"truncated: {size} bytes" in refusal(path)
    for length, words in ((0, "0 bytes, allowed are"), (10**8 + 1, "allowed are"), (2**64 - 1, "allowed are"),
                          (11, "truncated: 18 bytes, its header alone")):  # fmt: skip
        assert words in refusal(put(path, "{}" + " " * 8, length=length))


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "Is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "Too many levels" in refusal(tmp_path / "loop")


def test_a_pickle_is_named_and_a_header_that_starts_like_one_is_not(tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=not legacy)
        message = refusal(tmp_path / "a.bin")
        assert "pickle files are refused" in message
        assert "model.save_pretrained(DIR, safe_serialization=True)" in message
    (tmp_path / "short").write_bytes(b"\x80\x04N.")
    assert "pickle" in refusal(tmp_path / "short")
    assert check(put(tmp_path / "a", json.dumps(entry()).ljust(0x280), bytes(8)))


PIECES = st.sampled_from([bytes([c]) for c in b'0123456789{}[]",:-.\\eux \n\x00\xff']) | st.binary(
    min_size=1, max_size=3
)
EDITS = st.tuples(st.sampled_from(["put", "insert", "cut", "end"]), st.floats(0, 1, exclude_max=True), PIECES)


@settings(max_examples=600, deadline=None)
@given(st.lists(EDITS, min_size=1, max_size=3), st.booleans())
def test_a_mutated_file_is_refused_or_read_as_the_library_does(
    shared: Path, edits: list[tuple[str, float, bytes]], fit: bool
) -> None:
    tensors = {"a": torch.ones(2), "b": torch.arange(3, dtype=torch.uint8), "c": torch.zeros(0, 1)}
    data = write(shared, tensors, {"k": "v"})
    for kind, where, piece in edits:
        at = int(where * len(data))
        if kind == "end":
            data = data[:at]
        else:
            data = data[:at] + (b"" if kind == "cut" else piece) + data[at + (0 if kind == "insert" else len(piece)) :]
    if fit:  # the length of the header follows its change, so that the change is what is judged
        rest = data[data.rfind(b"}") + 1 :]
        data = max(0, len(data) - len(rest.lstrip(b" ")) - 8).to_bytes(8, "little") + data[8:]
    shared.write_bytes(data)
    check(shared)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.booleans())
def test_arbitrary_bytes_are_refused(shared: Path, data: bytes, brace: bool) -> None:
    if brace:
        put(shared, b"{" + data)
    else:
        shared.write_bytes(data)
    check(shared)


NUMBERS = st.integers(0, 9) | st.sampled_from([-1, True, 1.0, None, 2**64])
CHANGES = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    st.sampled_from(["I8", "F16", "F4", "C64"]) | st.lists(NUMBERS, max_size=3),
)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["U8", "BF16"]), st.lists(st.integers(0, 3), max_size=2)), max_size=3),
    st.dictionaries(st.integers(0, 2), st.integers(-3, 3), max_size=1),
    st.lists(CHANGES, max_size=1),
    st.randoms(use_true_random=False),
)
def test_any_layout_is_refused_or_read_as_the_library_does(
    shared: Path,
    tensors: list[tuple[str, list[int]]],
    shifts: dict[int, int],
    changes: list[tuple[int, str, Any]],
    random: Random,
) -> None:
    entries, size = [], 0
    for index, (dtype, shape) in enumerate(tensors):
        start = max(0, size + shifts.get(index, 0))  # over the tensor before, or a hole after it
        size = start + math.prod(shape) * (2 if dtype == "BF16" else 1)
        entries.append({"dtype": dtype, "shape": shape, "data_offsets": [start, size]})
    for index, field, value in changes:
        if index < len(entries):
            entries[index][field] = value
    random.shuffle(entries)
    read = check(put(shared, dict(zip("abc", entries, strict=False)), random.randbytes(size)))
    assert read or changes or shifts
