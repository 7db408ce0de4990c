# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, from local files only.

`load_tokenizer(spec)` knows three kinds:

| spec                                                             | what it is                                |
|------------------------------------------------------------------|-------------------------------------------|
| `bytes`                                                          | UTF-8 bytes, an eos and a pad; no files   |
| a folder with encoder.json + vocab.bpe, or vocab.json + merges.txt | GPT-2's byte-level BPE                  |
| a folder with tokenizer.json                                     | any fast tokenizer of the Hugging Face kind |

Nothing is downloaded, unpickled or executed. Text never becomes a special token: an `<|endoftext|>` inside a data
file is encoded as those thirteen characters, so data cannot end a sequence by itself. The one exception is what a chat
template has rendered: `encode_rendered` is for it alone, and `python -m data_prep` refuses messages that spell one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from lora_megatron.data.manifest import load_json_object
from lora_megatron.errors import DataError

_BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_EOS_TEXT = "<|endoftext|>"
_WORD_START = "▁"  # SentencePiece's space
_PRINTABLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER_BYTES = [byte for byte in range(256) if byte not in _PRINTABLE_BYTES]
_BYTE_OF_SYMBOL = {chr(byte): byte for byte in _PRINTABLE_BYTES} | {chr(256 + i): b for i, b in enumerate(_OTHER_BYTES)}
"""GPT-2's letters for bytes in a byte-level vocabulary."""


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer; ids are in [0, vocab_size)."""

    name: str
    vocab_size: int
    eos_id: int
    pad_id: int
    fingerprint: str
    """SHA-256 in hex of what defines the mapping; two tokenizers with one fingerprint are the same."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of what a chat template rendered: the special tokens it spells are theirs, and none is added."""

    def special_in(self, text: str) -> str | None:
        """The first special token that `encode_rendered` would find in `text`, or None."""

    def token_text(self, token: int) -> str:
        """What a person is shown of one id: its text, a special token's name, or `<0xE2>` for a part of a character."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are skipped, incomplete UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """Ids 0..255 are the UTF-8 bytes, 256 ends a sequence, 257 pads."""

    name = "bytes"
    vocab_size = 258
    eos_id = 256
    pad_id = 257
    fingerprint = hashlib.sha256(b"utf-8 bytes 0..255, eos 256, pad 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte of `text`."""
        return list(text.encode("utf-8"))

    def encode_rendered(self, text: str) -> list[int]:
        """The same: there is no special token that a text could spell."""
        return self.encode(text)

    def special_in(self, text: str) -> str | None:
        """None."""

    def token_text(self, token: int) -> str:
        """An ASCII character, `<0xE2>`, `<eos>` or `<pad>`."""
        return {self.eos_id: "<eos>", self.pad_id: "<pad>"}.get(token) or _show_bytes(bytes([token]))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the byte ids; other ids are skipped."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class FastTokenizer:
    """A `tokenizers.Tokenizer` with its end and padding ids.

    vocab_size: highest id + 1, so that an embedding of this height serves every id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str, eos_id: int, pad_id: int, fingerprint: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # special tokens written in a text stay text
        self._backend = backend
        self._skipped = {eos_id, pad_id}
        self._special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.name = name
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.fingerprint = fingerprint

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of what a chat template rendered: the special tokens it spells are theirs, and none is added."""
        self._backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._backend.encode_special_tokens = True

    def special_in(self, text: str) -> str | None:
        """The first special token that `encode_rendered` would find in `text`, or None."""
        return next((self._special[i] for i in self.encode_rendered(text) if i in self._special), None)

    def token_text(self, token: int) -> str:
        """The token's text, with the space that begins a word; bytes that are no whole character in hex."""
        piece = self._backend.id_to_token(token) or f"<{token}>"
        if token in self._special or token in self._skipped:
            return piece
        text = self._backend.decode([token])
        if _WORD_START in piece:
            return piece.replace(_WORD_START, " ")
        if "\ufffd" in text and all(symbol in _BYTE_OF_SYMBOL for symbol in piece):
            return _show_bytes(bytes(_BYTE_OF_SYMBOL[symbol] for symbol in piece))
        return text or piece

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are skipped."""
        kept = [int(i) for i in ids if int(i) not in self._skipped]
        return self._backend.decode(kept, skip_special_tokens=True)


def _show_bytes(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in content)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes" or a folder (see the module's table).

    Raises DataError naming the path and what was expected when files are missing or damaged.
    """
    if spec == "bytes":
        return ByteTokenizer()
    folder = Path(spec)
    if not folder.is_dir():
        raise DataError(f"tokenizer {spec!r} is neither 'bytes' nor a folder with tokenizer files")
    if (folder / "tokenizer.json").exists():
        return _load_tokenizer_json(folder)
    for vocabulary, merges in _BPE_FILES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return _load_byte_level_bpe(folder / vocabulary, folder / merges)
    raise DataError(f"no tokenizer in {folder}: expected tokenizer.json, or encoder.json + vocab.bpe")


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds the files of a tokenizer that `load_tokenizer` knows."""
    return (folder / "tokenizer.json").exists() or any(
        (folder / vocabulary).exists() and (folder / merges).exists() for vocabulary, merges in _BPE_FILES
    )


def _load_byte_level_bpe(vocabulary_path: Path, merges_path: Path) -> FastTokenizer:
    vocabulary = load_json_object(vocabulary_path, "a BPE vocabulary (token -> id)")
    if any(type(value) is not int for value in vocabulary.values()):
        raise DataError(f"{vocabulary_path}: every token needs an integer id")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise DataError(f"{vocabulary_path}: ids must be 0..{len(vocabulary) - 1}, each once")
    if _EOS_TEXT not in vocabulary:
        raise DataError(f"{vocabulary_path}: no {_EOS_TEXT} token to end sequences with")
    # A byte without a token would be dropped from texts in silence.
    absent = [symbol for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet() if symbol not in vocabulary]
    if absent:
        raise DataError(f"{vocabulary_path}: {len(absent)} of 256 byte symbols have no token; is the file complete?")
    merges = _read_merges(merges_path, vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    eos_id = vocabulary[_EOS_TEXT]
    fingerprint = _fingerprint("byte-level-bpe", vocabulary_path, merges_path)
    return FastTokenizer(
        backend, name=vocabulary_path.parent.name, eos_id=eos_id, pad_id=eos_id, fingerprint=fingerprint
    )


def _read_merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; expected BPE merges") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected BPE merges") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or any(token not in vocabulary for token in (*parts, "".join(parts))):
            raise DataError(f"{path}:{number}: {line[:60]!r} is not a merge of two tokens into a token")
        merges.append((parts[0], parts[1]))
    return merges


def _load_tokenizer_json(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    load_json_object(path, "a tokenizers file")  # the library's own parser takes duplicate keys
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizers file: {error}") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError(f"{path} has an empty vocabulary")
    eos_id = _special_id(folder, "eos", vocabulary)
    if eos_id is None:
        raise DataError(
            f"{folder}: no end token; set 'eos_token' in tokenizer_config.json or 'eos_token_id' in config.json"
        )
    pad_id = _special_id(folder, "pad", vocabulary)
    pad_id = eos_id if pad_id is None else pad_id
    fingerprint = _fingerprint(f"tokenizer.json eos={eos_id} pad={pad_id}", path)
    return FastTokenizer(backend, name=folder.name, eos_id=eos_id, pad_id=pad_id, fingerprint=fingerprint)


def _special_id(folder: Path, role: str, vocabulary: dict[str, int]) -> int | None:
    """The id of the "eos" or "pad" token by the first file that names it, or None. Raises DataError if unknown."""
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file_name
        token: Any = load_json_object(path, "tokenizer settings").get(f"{role}_token") if path.exists() else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            if not isinstance(token, str) or token not in vocabulary:
                raise DataError(f"{path}: {role}_token {token!r} is not in the vocabulary of tokenizer.json")
            return vocabulary[token]
    path = folder / "config.json"
    value: Any = load_json_object(path, "a model configuration").get(f"{role}_token_id") if path.exists() else None
    value = value[0] if isinstance(value, list) and value else value
    if value is not None and (type(value) is not int or value not in vocabulary.values()):
        raise DataError(f"{path}: {role}_token_id {value!r} is not an id of tokenizer.json")
    return value


def _fingerprint(kind: str, *paths: Path) -> str:
    digest = hashlib.sha256(kind.encode("utf-8"))
    for path in paths:
        content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "little"))  # so that moving a byte between files changes the hash
        digest.update(content)
    return digest.hexdigest()
