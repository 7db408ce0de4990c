# SPDX-License-Identifier: Apache-2.0
"""What the probe of the accelerator makes of GPUs, drivers and interfaces, real ones where there are some."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_megatron.measure import accelerator
from lora_megatron.measure.software import MARK


def _machine(monkeypatch: pytest.MonkeyPatch, *, driver: str | None, cuda: str | None, gpus: list[Any]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerator, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])


def _gpu(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, total_memory=80 * 2**30, major=9, minor=0)


def test_gpus_are_counted_and_unlike_ones_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, driver="580.1", cuda="13.0", gpus=[_gpu("H100")] * 8)
    answer = accelerator.gpus()
    assert (answer["state"], answer["version"]) == ("ok", "CUDA 13.0, driver 580.1")
    assert answer["note"] == "8 x H100, 80.0 GiB, sm_90"
    _machine(monkeypatch, driver="580.1", cuda="13.0", gpus=[_gpu("H100"), _gpu("A100")])
    assert accelerator.gpus()["state"] == "wrong"


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "state", "said"),
    [
        (None, None, None, "absent", ""),
        ("580.1", None, None, "wrong", "is built without CUDA"),
        ("470.1", "13.0", None, "wrong", "is the driver too old for it?"),
        ("580.1", "13.0", "", "absent", "CUDA_VISIBLE_DEVICES is empty"),
    ],
)
def test_a_driver_that_torch_cannot_use_is_told_from_none(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, cuda: str | None, visible: str | None, state: str, said: str
) -> None:
    _machine(monkeypatch, driver=driver, cuda=cuda, gpus=[])
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    answer = accelerator.gpus()
    assert answer["state"] == state
    assert said in answer["note"]


def test_a_name_that_resolves_to_nothing_is_wrong_unless_an_interface_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(name: str) -> str:
        raise OSError("no such host")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(accelerator.socket, "gethostbyname", unknown)
    assert "set GLOO_SOCKET_IFNAME" in accelerator.gloo()["note"]


def test_a_kernel_that_does_not_exist_does_not_run() -> None:
    q = torch.randn(1, 2, 16, 8)
    assert accelerator._attends("MATH", q)
    assert not accelerator._attends("NO_SUCH_KERNEL", q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_and_its_kernels_are_found() -> None:
    command = [sys.executable, "-m", "lora_megatron.measure.accelerator"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    answers = json.loads(done.stdout.splitlines()[-1].removeprefix(MARK))
    assert {name: answer["state"] for name, answer in answers.items()} == dict.fromkeys(accelerator.QUESTIONS, "ok")
    assert "flash" in answers["GPU attention"]["note"]
