# SPDX-License-Identifier: Apache-2.0
"""What torch can do on this machine: GPUs and their driver, NCCL, gloo, attention kernels. Tried, not looked up.

python -m lora_megatron.measure.accelerator      one JSON object: name -> state, version, note
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lora_megatron.measure.software import MARK
from lora_megatron.measure.units import show_bytes

Answer = dict[str, str]


def _answer(state: str, version: str = "", note: str = "") -> Answer:
    return {"state": state, "version": version, "note": note}


def _driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def gpus() -> Answer:
    """GPUs that torch can use, and the driver."""
    driver = _driver()
    if torch.cuda.is_available():
        models: dict[str, int] = {}
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            name = f"{gpu.name}, {show_bytes(gpu.total_memory)}, sm_{gpu.major}{gpu.minor}"
            models[name] = models.get(name, 0) + 1
        note = "; ".join(f"{count} x {name}" for name, count in models.items())
        if len(models) > 1:
            return _answer(
                "wrong", f"driver {driver}", f"unlike GPUs: {note}: choose like ones with CUDA_VISIBLE_DEVICES"
            )
        return _answer("ok", f"CUDA {torch.version.cuda}, driver {driver or 'unknown'}", note)
    if driver is None:
        return _answer("absent")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return _answer("absent", f"driver {driver}", "CUDA_VISIBLE_DEVICES is empty")
    built = f"torch {torch.__version__} is built without CUDA: install one that is"
    if torch.version.cuda is not None:
        built = f"torch's CUDA {torch.version.cuda} does not start: is the driver too old for it?"
    return _answer("wrong", f"driver {driver}", built)


def nccl() -> Answer:
    """The library that GPUs talk through."""
    if not dist.is_nccl_available():
        return _answer("absent")
    return _answer("ok", ".".join(map(str, torch.cuda.nccl.version())))


def gloo() -> Answer:
    """The library that CPU ranks talk through: a group of one, on the interface it would choose."""
    if not dist.is_gloo_available():
        return _answer("absent")
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    if not interface and not address:
        note = f"this machine's name {name} resolves to nothing: set GLOO_SOCKET_IFNAME (lo on one machine)"
        return _answer("wrong", note=note)
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    except RuntimeError as error:
        return _answer("wrong", f"interface {interface or address}", str(error).splitlines()[0][:200])
    return _answer("ok", f"interface {interface}" if interface else f"address {address}")


def attention() -> Answer:
    """The fused kernels of scaled dot product attention, each tried on a small bf16 example."""
    if not torch.cuda.is_available():
        return _answer("absent")
    q = torch.randn(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda")
    working = [name for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if _attends(name, q)]
    version = f"cuDNN {torch.backends.cudnn.version()}"
    if not working:
        return _answer("wrong", version, "none of cuDNN's, flash and efficient attention runs")
    return _answer("ok", version, ", ".join(name.removesuffix("_ATTENTION").lower() for name in working))


def _attends(name: str, q: torch.Tensor) -> bool:
    backend = getattr(SDPBackend, name, None)
    if backend is None:
        return False
    try:
        with sdpa_kernel([backend]):
            return bool(scaled_dot_product_attention(q, q, q, is_causal=True).isfinite().all())
    except RuntimeError:
        return False


QUESTIONS: dict[str, Callable[[], Answer]] = {"GPU": gpus, "NCCL": nccl, "gloo": gloo, "GPU attention": attention}


def main() -> None:
    """Print every answer; one that fails is wrong and does not take the others with it."""
    answers = {}
    for name, ask in QUESTIONS.items():
        try:
            answers[name] = ask()
        except Exception as error:
            answers[name] = _answer("wrong", note=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    print(MARK + json.dumps(answers), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
