# SPDX-License-Identifier: Apache-2.0
"""Which packages are here, and right: each is imported in a process of its own, so that one that crashes is only found.

python -m lora_megatron.measure.software apex      one JSON object: version, and what is wrong if something is
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

State = Literal["ok", "absent", "wrong"]
SECONDS_TO_IMPORT = 120.0
_AT_ONCE = 4
MARK = "lora-megatron-probe:"  # what packages print themselves is not the answer


@dataclass(frozen=True)
class Found:
    """What became of looking for something: its version or value, and what is wrong with it, or how it is here."""

    state: State
    version: str = ""
    note: str = ""


def look_for(names: Iterable[str], *, seconds: float = SECONDS_TO_IMPORT) -> dict[str, Found]:
    """Probe packages, several at once; `names` are keys of PROBES."""
    names = list(names)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: _probe(name, seconds), names), strict=True))


def what_torch_can(*, seconds: float = SECONDS_TO_IMPORT) -> dict[str, Found]:
    """GPU, NCCL, gloo and GPU attention; see `accelerator`."""
    answer = _ask("lora_megatron.measure.accelerator", seconds=seconds)
    return {"GPU": answer} if isinstance(answer, Found) else {name: Found(**facts) for name, facts in answer.items()}


def _probe(name: str, seconds: float) -> Found:
    answer = _ask("lora_megatron.measure.software", name, seconds=seconds)
    return answer if isinstance(answer, Found) else Found(**answer)


def _ask(module: str, *arguments: str, seconds: float) -> Found | dict[str, Any]:
    """The JSON object that a module prints when it runs in a process of its own, or what became of that process."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=_without_world(),
        )
    except subprocess.TimeoutExpired:
        return Found("wrong", note=f"its import did not end within {seconds:g} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return answer
    if done.returncode < 0:
        return Found("wrong", note=f"its import crashes ({signal.Signals(-done.returncode).name})")
    said = done.stderr.strip().splitlines() or [f"it ends the interpreter with status {done.returncode}"]
    return Found("wrong", note=f"its import fails: {said[-1][:200]}")


def _without_world() -> dict[str, str]:
    """A probe is no rank, whoever started the doctor."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _plain(module: str, *distributions: str, at_least: tuple[int, ...] = ()) -> Callable[[], Found]:
    """A package that only has to be importable, and new enough."""

    def probe() -> Found:
        importlib.import_module(module)
        version = _version(*(distributions or (module,)))
        if version and _numbers(version) < at_least:
            return Found("wrong", version, f"older than {'.'.join(map(str, at_least))}, the oldest that works")
        return Found("ok", version)

    return probe


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); stops at the first part that is no number."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _megatron() -> Found:
    version = _version("megatron-core")
    if version and not (0, 16, 1) <= _numbers(version) < (0, 20):
        return Found(
            "wrong", version, "this project works with 0.16.1 to 0.19: pip install 'megatron-core>=0.16.1,<0.20'"
        )
    if _numbers(version) >= (0, 17) and sys.version_info < (3, 12):
        return Found("wrong", version, "needs Python 3.12; 0.16.1 is the newest for this one")
    importlib.import_module("megatron.core.optimizer")  # imports apex and Transformer Engine, where they are
    importlib.import_module("megatron.core.models.gpt")
    return Found("ok", version)


def _apex() -> Found:
    """NVIDIA's has fused kernels; a package of the same name on the package index is a toolkit for web servers."""
    importlib.import_module("apex")
    version = _version("apex")
    parts = ("apex.optimizers", "apex.normalization", "apex.multi_tensor_apply")
    if missing := [part for part in parts if importlib.util.find_spec(part) is None]:
        return Found("wrong", version, f"not NVIDIA's apex (no {missing[0]}): pip uninstall apex, build NVIDIA's")
    for part in parts:
        importlib.import_module(part)
    extensions = ("amp_C", "fused_layer_norm_cuda")
    if missing := [name for name in extensions if importlib.util.find_spec(name) is None]:
        return Found("wrong", version, f"built without its CUDA extensions (no {missing[0]}): build it with them")
    return Found("ok", version)


def _transformer_engine() -> Found:
    importlib.import_module("transformer_engine.pytorch")
    return Found("ok", _version("transformer-engine", "transformer_engine", "transformer-engine-torch"))


def _flash_attention() -> Found:
    """The fourth; older ones have the same name for Python, and no use here."""
    version = _version("flash-attn-4")
    if not version:
        return Found("absent", note="flash_attn is another FlashAttention")
    importlib.import_module("flash_attn.cute.interface")
    return Found("ok", version)


def _deepspeed() -> Found:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the import alone shall not look for GPUs
    found = _plain("deepspeed", at_least=(0, 18))()
    importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    return found


PROBES: dict[str, Callable[[], Found]] = {
    "torch": _plain("torch", at_least=(2, 6)),
    "megatron-core": _megatron,
    "numpy": _plain("numpy"),
    "pyarrow": _plain("pyarrow.parquet", "pyarrow", at_least=(15,)),
    "safetensors": _plain("safetensors", at_least=(0, 4)),
    "tokenizers": _plain("tokenizers"),
    "matplotlib": _plain("matplotlib"),
    "tensorboard": _plain("tensorboard"),
    "Triton": _plain("triton"),
    "apex": _apex,
    "Transformer Engine": _transformer_engine,
    "FlashAttention 4": _flash_attention,
    "DeepSpeed": _deepspeed,
    "bitsandbytes": _plain("bitsandbytes"),
    "transformers": _plain("transformers", at_least=(4, 44)),
    "PEFT": _plain("peft", at_least=(0, 12)),
}
_TOP_LEVEL = {
    "megatron-core": "megatron",
    "Transformer Engine": "transformer_engine",
    "FlashAttention 4": "flash_attn",
}


def main(name: str) -> None:
    """Print what the probe `name` found, in this process."""
    if importlib.util.find_spec(_TOP_LEVEL.get(name, name.lower())) is None:
        found = Found("absent")
    else:
        try:
            found = PROBES[name]()
        except Exception as error:  # whatever a package of others raises is what is wrong with it
            text = " ".join(str(error).split())[:200]
            found = Found("wrong", note=f"its import fails: {type(error).__name__}: {text}")
    print(MARK + json.dumps(found.__dict__), flush=True)
    os._exit(0)  # what a package does at exit is of no interest


if __name__ == "__main__":
    main(sys.argv[1])
