# SPDX-License-Identifier: Apache-2.0
"""A merge that cannot be done ends in one line that names the remedy, and nothing new is anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.seal import reseal
from tests.huggingface.adapters import make_adapter
from tests.huggingface.merges import Merge, everything
from tests.huggingface.models import save_model
from tests.pool import Pool


def prepare(folder: Path) -> None:
    """base and adapter; other, an equally shaped base; mistral, another shape."""
    make_adapter(save_model("llama", folder / "base", max_shard_size="50KB"), folder / "adapter")
    shutil.copytree(folder / "base", folder / "other")
    shard = next(iter(sorted((folder / "other").glob("*.safetensors"))))
    save_file({name: value + 1 for name, value in load_file(shard).items()}, shard, {"format": "pt"})
    save_model("mistral", folder / "mistral")


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `prepare`, read only."""
    folder = tmp_path_factory.mktemp("refused")
    pool.run(1, prepare, folder=folder)
    return folder


@pytest.fixture
def merge(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Merge:
    return Merge(made, tmp_path, capsys)


def test_it_says_what_it_merged(merge: Merge) -> None:
    status, out, err = merge()
    assert (status, err) == (0, "")
    assert f"merged: {merge.out}" in out
    assert "28 of 39 tensors changed, 158 KiB of weights written" in out
    assert "largest change: |W' - W| / |W| = 0." in out
    assert not torch.distributed.is_initialized()


def test_never_in_place_and_never_over_something(merge: Merge, made: Path) -> None:
    for name in ("base", "adapter"):
        copy = merge.folder / name
        shutil.copytree(made / name, copy)
        for out in (copy, copy / "sub" / "out"):
            merge.refused(2, f"--out {out}", "is inside of the", "choose another", **{name: copy, "out": out})
    link = merge.folder / "link"
    link.symlink_to(merge.folder / "base")
    merge.refused(2, "is inside of the base", base=merge.folder / "base", out=link)
    file = merge.folder / "file"
    file.write_text("mine")
    merge.refused(2, f"{file} exists already", out=file)
    merge.refused(2, f"{merge.folder} exists already", out=merge.folder)
    merge.refused(4, f"cannot write {file / 'out'}", "choose another", out=file / "out")
    empty = merge.folder / "empty"
    empty.mkdir()
    assert merge(out=empty)[0] == 0


def test_only_what_belongs_to_the_model_is_copied(merge: Merge, made: Path) -> None:
    base = merge.folder / "base"
    shutil.copytree(made / "base", base)
    (base / "elsewhere").write_text("{}")
    mine = {"generation_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md"}
    linked = {"vocab.json"}  # the hub's cache consists of links
    theirs = {"pytorch_model.bin", "optimizer.pt", "a.pth", "b.ckpt", "stray.safetensors", "adapter_config.json"}
    theirs |= {"pytorch_model.bin.index.json", "tf.h5"}
    for name in mine | theirs:
        (base / name).write_text('"x"')
    (base / "elsewhere").rename(merge.folder / "elsewhere")
    for name in linked:
        (base / name).symlink_to(merge.folder / "elsewhere")
    (base / "onnx").mkdir()
    assert merge(base=base)[0] == 0
    model = {path.name for path in (made / "base").iterdir()}
    assert {path.name for path in merge.out.iterdir()} == model | mine | linked
    assert not any(path.is_symlink() for path in merge.out.iterdir())
    for name in mine | linked:
        assert (merge.out / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_of_another_base(merge: Merge, made: Path) -> None:
    merge.refused(4, "was trained on another base", "give the model it belongs to", base=made / "other")
    assert merge("--any-base", base=made / "other")[0] == 0
    status, _, err = merge("--any-base", base=made / "mistral", out=merge.folder / "second")
    assert status == 4
    assert "has shape [16, 2], this base needs [32, 2]" in err
    assert not (merge.folder / "second").exists()


def without_a_tensor(folder: Path) -> None:
    stored = load_file(folder / "adapter_model.safetensors")
    stored.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight")
    save_file(stored, folder / "adapter_model.safetensors")
    reseal(folder)


def huge(folder: Path) -> None:
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({key: value * 1e30 for key, value in stored.items()}, folder / "adapter_model.safetensors")
    reseal(folder)


def flipped(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (flipped, ["adapter_model.safetensors is damaged", "SHA-256"]),
        (without_a_tensor, ["layers.1.self_attn.v_proj.lora_A.weight is missing"]),
        (huge, ["would hold values that are not finite", "alpha"]),
        (lambda folder: (folder / "manifest.json").unlink(), ["is a PEFT adapter", "lora-megatron import"]),
    ],
)
def test_a_damaged_adapter(merge: Merge, made: Path, fault: Callable[[Path], None], words: list[str]) -> None:
    adapter = merge.folder / "adapter"
    shutil.copytree(made / "adapter", adapter)
    fault(adapter)
    merge.refused(4, *words, adapter=adapter)


def test_a_run_folder_in_place_of_its_adapter(merge: Merge, made: Path) -> None:
    adapter = merge.folder / "run" / "adapter"
    shutil.copytree(made / "adapter", adapter)
    merge.refused(4, "is not an adapter", f"give {adapter}", adapter=adapter.parent)


def test_a_damaged_base(merge: Merge, made: Path) -> None:
    base = merge.folder / "base"
    shutil.copytree(made / "base", base)
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    merge.refused(4, shard.name, "truncated", base=base)
    shard.unlink()
    merge.refused(4, shard.name, "No such file", base=base)
    merge.refused(4, "config.json", "No such file", base=merge.folder / "none")


def test_what_overflows_fp16_is_named(merge: Merge, made: Path) -> None:
    """fp16 ends at 65504; nothing becomes infinite in silence."""
    base, adapter = merge.folder / "half", merge.folder / "adapter"
    shutil.copytree(made / "base", base)
    for shard in base.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(shard).items()}, shard, {"format": "pt"})
    shutil.copytree(made / "adapter", adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({key: value * 1e3 for key, value in stored.items()}, adapter / "adapter_model.safetensors")
    reseal(adapter)
    before = everything(merge.folder)
    status, _, err = merge("--any-base", base=base, adapter=adapter)
    assert (status, "not finite torch.float16 numbers" in err) == (4, True)
    assert everything(merge.folder) == before
