# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: what each tensor is called and which bytes of the file are its data.

    8 bytes: N, little endian | N bytes of JSON, padded with spaces | the tensors' data, without holes

Every rule whose breach another reader might understand differently is checked, so that two readers of a file never see
two contents. `parse_header` accepts less than the official reader and never anything that it refuses.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_megatron.strict_json import NotStrictJson, parse_json

assert sys.byteorder == "little", "safetensors data is little endian and is read as it stands"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the official reader's limit too
MAX_DIMENSIONS = 8
MAX_BYTES = 2**48  # of one tensor, an empty dimension counted as 1: more is not a model but an overflow in waiting
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class HeaderDefect(Exception):
    """What is wrong with a header, in words that follow the path."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its data are the bytes [start, stop) of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """How many bytes its data takes."""
        return self.stop - self.start


def make_header(entries: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """A file's first bytes, up to its data: the same for the same (name, dtype, shape) in order and metadata."""
    tree: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in entries:
        assert name != "__metadata__", "the name is the format's own"
        assert name not in tree, f"two tensors are called {name}"
        stop = position + dtype.itemsize * math.prod(shape)
        tree[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8  # so that the data starts aligned
    return length.to_bytes(8, "little") + text.ljust(length)


def parse_header(header: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries in the order of their data, and metadata, from a header and its length; raises HeaderDefect."""
    assert int.from_bytes(header[:8], "little") == len(header) - 8, "a header goes with its length"
    try:
        text = header[8:].decode("utf-8")
    except UnicodeDecodeError:
        raise HeaderDefect("its header is not UTF-8") from None
    try:
        tree = parse_json(text)
    except NotStrictJson as problem:
        raise HeaderDefect(f"its header is not strict JSON: {problem!s:.200}") from None
    except RecursionError:
        raise HeaderDefect("its header is not valid JSON: nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise HeaderDefect(f"its header is not valid JSON: {problem!s:.200}") from None
    metadata = tree.pop("__metadata__", {})
    if type(metadata) is not dict or not all(_is_text(key) and _is_text(metadata[key]) for key in metadata):
        raise HeaderDefect("__metadata__ is not a map of strings to strings")
    found = [_entry(name, value, len(header)) for name, value in tree.items()]
    if "-" in _JSON_STRING.sub("", text):  # only -0 is left: not a count, though Python makes it a plain 0
        raise HeaderDefect("its header holds a negative number")
    position, before = len(header), "the header"
    entries = sorted(found, key=lambda entry: (entry.start, entry.stop))
    for entry in entries:
        if entry.start != position:
            kind = "hole" if entry.start > position else "overlap"
            raise HeaderDefect(f"{kind} between the data of {before} and of {entry.name!r:.80}")
        position, before = entry.stop, f"{entry.name!r:.80}"
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, value: Any, base: int) -> Entry:
    """One checked entry of a header; offsets count from `base`. Raises HeaderDefect."""
    what = f"{name!r:.80}"
    if not _is_text(name):
        raise HeaderDefect(f"the name {what} is not Unicode text")
    if type(value) is not dict or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderDefect(f"the fields of {what} are not dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    if type(value["dtype"]) is not str:
        raise HeaderDefect(f"the dtype of {what} is not a string")
    dtype = DTYPES.get(value["dtype"])
    if dtype is None:
        raise HeaderDefect(f"{what} has an unknown dtype {value['dtype']!r:.40}, known are {', '.join(DTYPES)}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise HeaderDefect(f"the shape of {what} is not a list of integers from 0")
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderDefect(f"{what} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > MAX_BYTES:
        raise HeaderDefect(f"{what} has an absurd shape, of more than {MAX_BYTES} bytes")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise HeaderDefect(f"the data_offsets of {what} are not two integers")
    start, stop = offsets
    if not 0 <= start <= stop:
        raise HeaderDefect(f"the data_offsets of {what} are not in order from 0")
    if stop - start != (size := math.prod(shape) * dtype.itemsize):
        raise HeaderDefect(f"the length of the data of {what} is not the {size} bytes of its shape and dtype")
    return Entry(name, dtype, tuple(shape), base + start, base + stop)


def _is_text(value: Any) -> bool:
    """Whether `value` is a string without half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
