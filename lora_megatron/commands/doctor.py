# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron doctor`: what is here, right or wrong, and what it costs to do without.

Nothing that is examined is imported here, so that what is broken cannot break the doctor. A thing is `ok`, `absent` or
`wrong`. Only what every run needs must be ok; the rest costs speed or a feature.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_megatron.errors import ConfigError
from lora_megatron.measure import machine
from lora_megatron.measure.console import print_table
from lora_megatron.measure.software import PROBES, Found, look_for, what_torch_can

_RUNS = Path("runs")  # where run.dir is by default
# What every run needs, and why.
REQUIRED = {
    "torch": "everything",
    "megatron-core": "everything",
    "numpy": "data",
    "pyarrow": "data sets are Parquet",
    "safetensors": "weights, adapters, checkpoints",
    "tokenizers": "text",
    "matplotlib": "the report's picture",
    "tensorboard": "the run folder's tensorboard/",
}
# What may be absent, and what that costs.
COSTS = {
    "GPU": "training runs on the CPU over gloo: the same results, tiny models only",
    "NCCL": "no more than one GPU",
    "gloo": "no more than one CPU process",
    "GPU attention": "scores of s x s numbers a head in memory, on a GPU",
    "Triton": "nothing on 0.16 of megatron-core; 0.19 does not import without it",
    "apex": "LayerNorm in torch's kernel; torch's AdamW, unless Transformer Engine has one",
    "Transformer Engine": "its FusedAdam; parallel.context above 1, which is refused",
    "FlashAttention 4": "train.attention=fa4; torch's attention does the same, slower on Hopper and newer GPUs",
    "DeepSpeed": "optimizer.sharding=deepspeed; megatron's sharding does the same",
    "bitsandbytes": "nothing: no code here uses it",
    "transformers": "tests compare Hugging Face models with it; training and merging do without",
    "PEFT": "tests compare exported adapters with it; export and import do without",
    "/dev/shm": "NCCL falls back to slower transports between the GPUs of a node",
    "OMP_NUM_THREADS": "under plain python a process takes every core",
}


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    name: str
    state: str
    version: str
    note: str
    required: bool
    cost: str
    """What its absence costs; for what is required, what needs it."""


def run_doctor(*, as_json: bool) -> None:
    """Print what was found, on stdout.

    Raises:
        ConfigError: something that every run needs is absent or wrong.
    """
    findings = [*examine()]
    unfit = [finding for finding in findings if finding.required and finding.state != "ok"]
    if as_json:
        print(json.dumps({"usable": not unfit, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        columns = ("", "state", "version", "what that means")
        print_table("what runs here need and can use", columns, [*_rows(findings)], numbers=False)
    if unfit:
        first = unfit[0]
        why = first.note or f"pip install {first.name}"
        others = f" (and {', '.join(finding.name for finding in unfit[1:])})" if unfit[1:] else ""
        raise ConfigError(f"{first.name} is {first.state}{others}: {why}")


def examine() -> Iterator[Finding]:
    """Everything, in the order of the table: interpreter, what is required, the accelerator, the rest, the machine."""
    yield _finding("Python", Found("ok", platform.python_version(), sys.executable))
    found = look_for(PROBES)
    can = what_torch_can() if found["torch"].state == "ok" else {}
    yield from (_finding(name, found.pop(name)) for name in REQUIRED)
    yield from (_finding(name, can[name]) for name in can)
    yield from (_finding(name, value) for name, value in found.items())
    gpus = 0 if "GPU" not in can or can["GPU"].state != "ok" else _count(can["GPU"])
    yield _finding("run folder", machine.run_folder(_RUNS))
    yield _finding("/dev/shm", machine.shared_memory(gpus=gpus))
    yield _finding("limits", machine.limits(gpus=gpus))
    yield _finding("OMP_NUM_THREADS", machine.threads())


def _count(gpu: Found) -> int:
    """`8 x NVIDIA H100, ...` -> 8."""
    return int(gpu.note.split(" x ", 1)[0])


def _finding(name: str, found: Found) -> Finding:
    required = name in REQUIRED or name == "run folder"
    return Finding(
        name, found.state, found.version, found.note, required, REQUIRED.get(name) or COSTS.get(name, "every run")
    )


def _rows(findings: list[Finding]) -> Iterator[tuple[str, str, str, str]]:
    for each in findings:
        meaning = each.note
        if each.state == "absent":
            lost = f"needed for {each.cost}" if each.required else f"without it: {each.cost}"
            meaning = f"{lost}; {each.note}" if each.note else lost
        yield each.name, each.state, each.version, meaning
