# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or not there: the manifest notices every change, replacing is one step."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_megatron.checkpoint import folder as folder_module
from lora_megatron.checkpoint.folder import read_manifest, write_folder
from lora_megatron.errors import CheckpointError
from lora_megatron.parallel import groups
from tests.commands.runs import names_in


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A world of one process."""
    groups.join_world()
    yield
    groups.stop()


def write(final: Path, value: float = 1.0, *, replace: bool = False) -> Path:
    def content(temporary: Path) -> dict[str, object]:
        save_file({"a": torch.full((40,), value)}, temporary / "a.safetensors")
        (temporary / "b.json").write_text('{"b": 1}\n')
        return {"kind": "test", "value": value}

    write_folder(final, content, replace=replace)
    return final


def test_what_is_written_is_whole_and_nothing_else_remains(tmp_path: Path) -> None:
    final = write(tmp_path / "deep" / "name")
    manifest = read_manifest(final)
    assert (manifest["kind"], manifest["value"]) == ("test", 1.0)
    assert set(manifest["files"]) == {"a.safetensors", "b.json"}
    assert names_in(final.parent) == ["name"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    final = write(tmp_path / "name")
    choose = random.Random(1)
    flips = 0
    for path in sorted(final.iterdir()):
        whole = path.read_bytes()
        for position in choose.sample(range(len(whole)), min(60, len(whole))):
            broken = bytearray(whole)
            broken[position] ^= 1 << choose.randrange(8)
            path.write_bytes(broken)
            with pytest.raises(CheckpointError, match=str(path)):
                read_manifest(final)
            flips += 1
        path.write_bytes(whole)
    assert flips > 120
    assert read_manifest(final)["value"] == 1.0


def test_truncated_missing_extra_and_swapped_files_are_named(tmp_path: Path) -> None:
    final, other = write(tmp_path / "name"), write(tmp_path / "other", 2.0)
    whole = (final / "a.safetensors").read_bytes()

    def refused(pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern):
            read_manifest(final)

    (final / "a.safetensors").write_bytes(whole[:-3])
    refused(r"a\.safetensors has \d+ bytes, the manifest says")
    (final / "a.safetensors").unlink()
    refused(r"a\.safetensors is missing although the manifest lists it")
    shutil.copy(other / "a.safetensors", final)  # a file of another step, of the same size
    refused(r"a\.safetensors is damaged: its SHA-256 is not the manifest's")
    (final / "a.safetensors").write_bytes(whole)
    (final / "c.safetensors").write_bytes(whole)
    refused(r"c\.safetensors is not listed in the manifest")
    (final / "c.safetensors").rename(final / "README.md")
    assert read_manifest(final)["value"] == 1.0
    (final / "manifest.json").unlink()
    refused(r"cannot read .*manifest\.json")
    refused_folder = tmp_path / "none"
    with pytest.raises(CheckpointError, match="none is not a folder"):
        read_manifest(refused_folder)


def reseal(folder: Path, text: str) -> None:
    """Put `text` in the manifest's place with a hash of its own, as somebody who means harm would."""
    manifest = json.loads(text)
    manifest.pop("sha256", None)
    manifest["sha256"] = folder_module._manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", ".."])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path, name: str) -> None:
    final = write(tmp_path / "name")
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    text = (final / "manifest.json").read_text().replace('"b.json"', json.dumps(name))
    reseal(final, text)
    (final / "b.json").unlink()
    with pytest.raises(CheckpointError, match=r"bad file entry|is missing although"):
        read_manifest(final)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 1, "format": 1}', "key 'format' appears twice"),
        ('{"format": NaN}', "it contains NaN"),
        ('{"format": 2, "files": {}}', "not a manifest of format 1"),
        ("[]", "holds a JSON list"),
        ("", "is not valid JSON"),
        ('{"format": 1, "files": {}}', "is damaged: its content is not what its own sha256 says"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    final = write(tmp_path / "name")
    (final / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_manifest(final)
    assert "\n" not in str(caught.value)


def test_an_existing_folder_is_refused_or_replaced_in_one_step(tmp_path: Path) -> None:
    final = write(tmp_path / "name")
    with pytest.raises(CheckpointError, match="name exists already; nothing is overwritten: move it away"):
        write(final, 2.0)
    assert read_manifest(final)["value"] == 1.0
    write(final, 3.0, replace=True)
    assert read_manifest(final)["value"] == 3.0
    assert names_in(tmp_path) == ["name"]


def test_a_file_system_that_cannot_exchange_names_still_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = write(tmp_path / "name")
    monkeypatch.setattr(folder_module, "_exchange", lambda one, other: False)
    write(final, 2.0, replace=True)
    assert read_manifest(final)["value"] == 2.0
    assert names_in(tmp_path) == ["name"]


def test_stale_temporaries_of_any_name_go_with_the_next_save(tmp_path: Path) -> None:
    for name in (".tmp-name-12345678", ".tmp-step-00000003-12345678", ".tmp-name-retired-12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.safetensors").write_bytes(b"half")
    (tmp_path / ".keep").write_text("not ours")
    write(tmp_path / "name")
    assert names_in(tmp_path) == [".keep", "name"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_failed_write_leaves_no_trace_and_the_old_folder(tmp_path: Path, replace: bool) -> None:
    if replace:
        write(tmp_path / "name")

    def fails(temporary: Path) -> dict[str, object]:
        (temporary / "a.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="name: No space left on device; free some space or choose another run"):
        write_folder(tmp_path / "name", fails, replace=replace)
    assert names_in(tmp_path) == (["name"] if replace else [])
    write(tmp_path / "name", 5.0, replace=replace)
    assert read_manifest(tmp_path / "name")["value"] == 5.0


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*/file(/name)?: (Not a directory|File exists); move"):
        write(tmp_path / "file" / "name")
