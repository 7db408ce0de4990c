# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron export` and `import`: adapters to PEFT and from it, for one Hugging Face base."""

from __future__ import annotations

from pathlib import Path

from lora_megatron.checkpoint.adapter import TENSORS
from lora_megatron.huggingface.peft_export import export_adapter
from lora_megatron.huggingface.peft_import import import_adapter
from lora_megatron.measure.units import show_bytes


def run_export(base: Path, adapter: Path, out: Path, *, any_base: bool) -> None:
    """Write `out` for PEFT and say what is in it.

    Raises:
        UserError: see `export_adapter`.
    """
    config = export_adapter(base, adapter, out, any_base=any_base)
    print(
        f"{out}: PEFT adapter of {', '.join(config['target_modules'])}, r = {config['r']}, alpha = "
        f"{config['lora_alpha']}, {_size(out)}\n"
        f"load it with peft.PeftModel.from_pretrained(model, {str(out)!r}), model being {base}"
    )


def run_import(base: Path, adapter: Path, out: Path) -> None:
    """Write `out` from PEFT's folder and say what is in it.

    Raises:
        UserError: see `import_adapter`.
    """
    facts = import_adapter(base, adapter, out)
    targets = sorted({key.partition(".")[2] for key in facts["ranks"]})
    print(f"{out}: adapter of {', '.join(targets)}, alpha = {facts['alpha']:g}, {_size(out)}")


def _size(folder: Path) -> str:
    return show_bytes((folder / TENSORS).stat().st_size)
