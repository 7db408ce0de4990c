# SPDX-License-Identifier: Apache-2.0
"""A merge that is stopped in the middle leaves nothing behind; one that is not stays near one tensor in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_megatron.__main__ import main
from lora_megatron.huggingface import merge as merging
from lora_megatron.strict_safetensors import SafetensorsFile, SafetensorsWriter
from tests.huggingface.adapters import make_adapter
from tests.huggingface.merges import Merge
from tests.huggingface.models import save_model
from tests.pool import Pool

LARGE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
LARGEST_TENSOR = 1024 * 8192 * 4


def save_large(folder: Path) -> None:
    """About 300 MB of fp32 in a checkpoint."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(LlamaConfig(**LARGE)).float()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE))
    shapes = {name: value.shape for name, value in meta.state_dict().items()}
    entries = [(name, torch.float32, shape) for name, shape in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.rand(shape))


def prepare(folder: Path) -> None:
    """base and adapter; large and large-adapter."""
    make_adapter(save_model("llama", folder / "base", max_shard_size="50KB"), folder / "adapter")
    save_large(folder / "large")
    make_adapter(folder / "large", folder / "large-adapter", targets={"q": 8, "fc1": 8, "fc2": 8})


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `prepare`, read only."""
    folder = tmp_path_factory.mktemp("interrupted")
    pool.run(1, prepare, folder=folder)
    return folder


@pytest.fixture
def merge(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Merge:
    return Merge(made, tmp_path, capsys)


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.huggingface.test_merge_interrupted"])
    return context


def at_tensor(number: int, action: Callable[[], object]) -> None:
    """Let this process run `action` before it writes its tensor `number` that has an adapter."""
    write, count = SafetensorsWriter.write, [0]

    def counted(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == number:
            action()
        write(*arguments)

    SafetensorsWriter.write = counted  # type: ignore[method-assign]  # a process of its own


def victim(made: Path, out: Path, how: str) -> None:
    """A merge that something happens to in the middle; ends with the command's status."""
    torch.set_num_threads(1)
    os.dup2(os.open(out.parent.parent / "stderr", os.O_CREAT | os.O_WRONLY), 2)
    if how == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    elif how == "Ctrl-C":
        at_tensor(12, lambda: signal.raise_signal(signal.SIGINT))
    else:
        at_tensor(12, lambda: os.kill(os.getpid(), signal.Signals[how]))
    arguments = ["--base", str(made / "base"), "--adapter", str(made / "adapter"), "--out", str(out)]
    raise SystemExit(main(["merge", *arguments]))


@pytest.mark.parametrize(
    ("how", "status"), [("full disk", 4), ("SIGTERM", 143), ("SIGHUP", 129), ("Ctrl-C", 130), ("SIGKILL", -9)]
)
def test_an_end_in_the_middle_leaves_nothing(
    merge: Merge, made: Path, forks: ForkServerContext, how: str, status: int
) -> None:
    process = forks.Process(target=victim, args=(made, merge.out, how))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == status
    said = (merge.folder / "stderr").read_text()
    left = [path.name for path in merge.folder.rglob("*") if path.name != "stderr"]
    if how == "full disk":
        assert said.startswith(f"error: cannot write {merge.out.parent}/.tmp-out-")
        assert "File too large; free some space or choose another folder" in said
    if how == "SIGKILL":  # no cleaning up is possible: the next merge of that name does it
        assert any(name.startswith(".tmp-out-") for name in left)
        assert not merge.out.exists()
        assert merge()[0] == 0
        assert [path.name for path in merge.out.parent.iterdir()] == ["out"]
    else:
        assert left == []


def test_a_merge_under_way_is_not_taken_for_an_abandoned_one(
    merge: Merge, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    copy, inner = merging._copy, []

    def second(source: Path, target: Path) -> None:
        if not inner:
            inner.append(None)
            inner.append(merge()[0])
        copy(source, target)

    monkeypatch.setattr(merging, "_copy", second)
    status, _, err = merge()
    assert inner == [None, 0]
    assert (status, "Directory not empty" in err) == (4, True)
    assert [path.name for path in merge.out.parent.iterdir()] == ["out"]


def measured(made: Path, out: Path, answers: Any) -> None:
    """Bytes by which the largest resident memory exceeds that after a tiny merge, which loads the code."""
    torch.set_num_threads(1)
    merging.merge(made / "base", made / "adapter", out.parent / "tiny")
    before = memory("VmRSS")
    merging.merge(made / "large", made / "large-adapter", out)
    answers.put(memory("VmHWM") - before)


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def test_memory_stays_near_one_tensor(made: Path, forks: ForkServerContext, tmp_path: Path) -> None:
    answers = forks.Queue()
    process = forks.Process(target=measured, args=(made, tmp_path / "out", answers))
    process.start()
    peak = answers.get(timeout=200)
    process.join()
    size = (made / "large" / "model.safetensors").stat().st_size
    assert size > 300e6
    assert peak < 2 * LARGEST_TENSOR  # the tensor, 16 MiB through which others are copied, fp32 blocks of 1 MiB
    with (
        SafetensorsFile(tmp_path / "out" / "model.safetensors") as new,
        SafetensorsFile(made / "large" / "model.safetensors") as old,
    ):
        name = "model.layers.1.mlp.down_proj.weight"
        factors = load_file(made / "large-adapter" / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight"] for f in "AB")
        torch.testing.assert_close(new.tensor(name)[:], old.tensor(name)[:] + 6 / 8 * (b @ a), rtol=1e-6, atol=1e-6)
