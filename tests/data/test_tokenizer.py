# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: round trips, the published GPT-2 vocabulary, and damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lora_megatron.data.tokenizer import load_tokenizer
from lora_megatron.errors import DataError

GPT2 = Path(__file__).parents[2].parent / "shared" / "data" / "gpt2_bpe"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="the GPT-2 vocabulary is not in ../shared/data")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def word_level(folder: Path, **config: object) -> Path:
    """A small tokenizer.json with the words a, b and the token </s>."""
    folder.mkdir()
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@given(texts)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == text


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer(str(GPT2))


@needs_gpt2
def test_gpt2_vocabulary_and_known_ids(gpt2) -> None:
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.pad_id) == (50257, 50256, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]  # published ids of this vocabulary
    assert gpt2.fingerprint == load_tokenizer(str(GPT2)).fingerprint


@needs_gpt2
@given(text=texts)
def test_gpt2_round_trip(gpt2, text: str) -> None:
    ids = gpt2.encode(text)
    assert gpt2.decode([*ids, gpt2.eos_id]) == text
    assert all(0 <= i < gpt2.vocab_size for i in ids)


@needs_gpt2
def test_text_cannot_forge_the_end_token(gpt2) -> None:
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.eos_id not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"


@needs_gpt2
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("encoder.json", lambda raw: raw[: len(raw) // 2], "encoder.json:1 is not valid JSON"),
        ("encoder.json", lambda raw: b"[1, 2]", "expected a BPE vocabulary"),
        ("encoder.json", lambda raw: raw.replace(b'"!": 0', b'"!": 1', 1), "each once"),
        ("encoder.json", lambda raw: raw.replace(b'"!": 0', b'"!": 0, "!": 0', 1), "appears twice"),
        ("encoder.json", lambda raw: raw.replace(b"endoftext", b"endofpext", 1), "no <|endoftext|> token"),
        ("encoder.json", lambda raw: b"\xff" + raw, "not valid JSON"),
        ("vocab.bpe", lambda raw: raw + b"one two three\n", "is not a merge"),
        ("vocab.bpe", lambda raw: raw + b"\xff\n", "not UTF-8"),
    ],
)
def test_damaged_bpe_files_are_named(file: str, damage, message: str, tmp_path: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        raw = (GPT2 / name).read_bytes()
        (tmp_path / name).write_bytes(damage(raw) if name == file else raw)
    with pytest.raises(DataError, match=message.replace("|", r"\|")) as caught:
        load_tokenizer(str(tmp_path))
    assert file in str(caught.value)


@needs_gpt2
def test_the_other_file_names_of_the_same_kind(gpt2, tmp_path: Path) -> None:
    shutil.copyfile(GPT2 / "encoder.json", tmp_path / "vocab.json")
    shutil.copyfile(GPT2 / "vocab.bpe", tmp_path / "merges.txt")
    assert load_tokenizer(str(tmp_path)).fingerprint == gpt2.fingerprint


def test_tokenizer_json_ignores_its_own_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(word_level(tmp_path / "t", eos_token={"content": "</s>"})))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (4, 3, 3)
    assert tokenizer.encode("a b a") == [0, 1, 0]
    assert 3 not in tokenizer.encode("a </s>")
    assert tokenizer.decode([0, 1, 3]) == "a b"


def test_end_token_from_the_model_configuration(tmp_path: Path) -> None:
    folder = word_level(tmp_path / "t")
    with pytest.raises(DataError, match="no end token"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text('{"eos_token_id": [3, 0], "pad_token_id": 1}')
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (3, 1)
    (folder / "config.json").write_text('{"eos_token_id": 99}')
    with pytest.raises(DataError, match="99 is not an id"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("eos", ["absent", ["a"], 7])
def test_unknown_end_token(eos: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not in the vocabulary"):
        load_tokenizer(str(word_level(tmp_path / "t", eos_token=eos)))


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}', "[" * 100_000, '{"a": NaN}'])
def test_broken_tokenizer_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither 'bytes' nor a folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))
