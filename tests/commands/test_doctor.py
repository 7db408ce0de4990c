# SPDX-License-Identifier: Apache-2.0
"""The doctor tells NVIDIA's apex from its namesake, survives what crashes on import, and says what absence costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_megatron.__main__ import main
from lora_megatron.commands import doctor
from lora_megatron.measure import machine
from lora_megatron.measure.software import PROBES, Found, look_for

APEX = ("apex/__init__", "apex/optimizers", "apex/normalization", "apex/multi_tensor_apply")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages come before the installed ones, in this process's children."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def put(folder: Path, *names: str, body: str = "") -> None:
    for name in names:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")


def put_version(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")


def look(name: str, *, seconds: float = 120.0) -> Found:
    return look_for([name], seconds=seconds)[name]


def test_the_other_apex_is_wrong(fakes: Path) -> None:
    put(fakes, "apex/__init__")
    put_version(fakes, "apex", "0.9.10")
    found = look("apex")
    assert (found.state, found.version) == ("wrong", "0.9.10")
    assert found.note.startswith("not NVIDIA's apex (no apex.optimizers): pip uninstall apex")


def test_nvidias_apex_is_right_with_its_extensions_only(fakes: Path) -> None:
    put(fakes, *APEX, "amp_C")
    assert "without its CUDA extensions (no fused_layer_norm_cuda)" in look("apex").note
    put(fakes, "fused_layer_norm_cuda")
    assert look("apex").state == "ok"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its import crashes (SIGSEGV)"),
        ("raise OSError('libcudart.so.13: cannot open')", "its import fails: OSError: libcudart.so.13: cannot open"),
        ("raise SystemExit(3)", "its import fails: it ends the interpreter with status 3"),
        ("print('hello'); import no_such_dependency", "its import fails: ModuleNotFoundError: No module named"),
    ],
)
def test_a_package_that_breaks_on_import_is_wrong_and_not_fatal(fakes: Path, body: str, said: str) -> None:
    put(fakes, "bitsandbytes/__init__", body=body)
    found = look("bitsandbytes")
    assert found.state == "wrong"
    assert found.note.startswith(said)


def test_a_package_whose_import_does_not_end_is_wrong(fakes: Path) -> None:
    put(fakes, "triton/__init__", body="import time; time.sleep(600)")
    assert look("Triton", seconds=1.5) == Found("wrong", note="its import did not end within 1.5 s")


def test_a_package_that_is_not_there_is_absent_and_one_that_is_too_old_is_wrong(fakes: Path) -> None:
    put(fakes, "peft/__init__")
    put_version(fakes, "peft", "0.4.0")
    found = look_for(["PEFT", "bitsandbytes"])
    assert found["PEFT"] == Found("wrong", "0.4.0", "older than 0.12, the oldest that works")
    assert found["bitsandbytes"].state in ("absent", "ok"), "it is nobody's dependency here, but may be installed"


def test_an_older_flash_attention_is_not_the_fourth(fakes: Path) -> None:
    put(fakes, "flash_attn/__init__")
    put_version(fakes, "flash_attn", "2.8.3")
    assert look("FlashAttention 4") == Found("absent", note="flash_attn is another FlashAttention")
    put_version(fakes, "flash_attn_4", "4.0.0b36")
    assert look("FlashAttention 4").note.startswith(
        "its import fails: ModuleNotFoundError: No module named 'flash_attn."
    )
    put(fakes, "flash_attn/cute/__init__", "flash_attn/cute/interface")
    assert look("FlashAttention 4") == Found("ok", "4.0.0b36")


def test_everything_that_can_be_absent_has_its_cost() -> None:
    accelerator = {"GPU", "NCCL", "gloo", "GPU attention"}
    assert set(PROBES) | accelerator | {"/dev/shm", "OMP_NUM_THREADS"} == set(doctor.REQUIRED) | set(doctor.COSTS)


def _stand_ins(monkeypatch: pytest.MonkeyPatch, **states: Found) -> None:
    found = {name: states.get(name.replace("-", "_"), Found("ok", "1.0")) for name in PROBES}
    monkeypatch.setattr(doctor, "look_for", lambda names: found)
    monkeypatch.setattr(doctor, "what_torch_can", lambda: {"GPU": Found("ok", "CUDA 13", "2 x a GPU")})


def test_what_is_required_decides_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stand_ins(monkeypatch, apex=Found("wrong", "0.9", "not NVIDIA's"), DeepSpeed=Found("absent"))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "not NVIDIA's" in shown
    assert "without it: optimizer.sharding=deepspeed" in shown

    _stand_ins(monkeypatch, megatron_core=Found("wrong", "0.12", "not one that works"))
    assert main(["doctor", "--json"]) == 2
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["usable"] is False
    assert captured.err == "error: megatron-core is wrong: not one that works\n"
    assert {"name", "state", "version", "note", "required", "cost"} == set(said["findings"][0])


def test_the_doctor_finds_this_machine_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PROBES", doctor.REQUIRED)  # the others would import torch three times more
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in said["findings"]}
    assert said["usable"] is True
    assert {states[name] for name in doctor.REQUIRED} == {"ok"}
    assert states["gloo"] == "ok"


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    assert machine.run_folder(tmp_path / "runs" / "new").state == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"
    found = machine.run_folder(Path("/proc/self/runs"))
    assert found.state == "wrong"
    assert "cannot be written" in found.note


@pytest.mark.parametrize(
    ("threads", "state"), [("1", "ok"), ("0", "wrong"), ("many", "wrong"), ("99999", "wrong"), (None, "absent")]
)
def test_threads(monkeypatch: pytest.MonkeyPatch, threads: str | None, state: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert machine.threads().state == state


def test_little_shared_memory_is_wrong_for_several_gpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64 * 2**20})())
    assert machine.shared_memory(gpus=1, folder=tmp_path).state == "ok"
    assert "--shm-size" in machine.shared_memory(gpus=8, folder=tmp_path).note
    assert machine.shared_memory(gpus=8, folder=tmp_path / "none").state == "absent"
