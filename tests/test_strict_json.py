# SPDX-License-Identifier: Apache-2.0
"""JSON that nobody vouches for: what the standard does not allow, or says twice, is an error in one line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_megatron.errors import CheckpointError
from lora_megatron.strict_json import load_json_object, parse_json


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' appears twice"),
        (b'{"a": NaN}', "it contains NaN"),
        (b'{"a": -Infinity}', "it contains -Infinity"),
        (b'{"a": 1e999}', "1e999, which is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number that is too long"),
        (b'{"a": ' + b"[" * 100_000, "RecursionError"),
        (b'{"a": "\xff"}', "UnicodeDecodeError"),
        (b'{"a": }', "is not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"", "is not valid JSON"),
    ],
)
def test_what_is_not_strict_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_json_object(path, "a test", CheckpointError)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_late_duplicate_among_many_keys_takes_no_time() -> None:
    text = "{" + ", ".join(f'"{i}": 0' for i in range(200_000)) + ', "199999": 1}'
    started = time.perf_counter()
    with pytest.raises(Exception, match="'199999' appears twice"):
        parse_json(text)
    assert time.perf_counter() - started < 5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_what_is_strict_is_read_as_it_is(value: Any) -> None:
    import json

    assert parse_json(json.dumps(value)) == value
