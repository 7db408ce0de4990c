# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron merge`: an adapter of this project into a Hugging Face checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

from lora_megatron.huggingface.merge import merge
from lora_megatron.measure.units import show_bytes, show_count


def run_merge(base: Path, adapter: Path, out: Path, *, any_base: bool) -> None:
    """Merge, and say on stdout what came of it.

    Raises:
        UserError: see `merge`.
    """
    merged = merge(base, adapter, out, any_base=any_base)
    print(f"merged: {out}")
    print(
        f"{show_count(merged.changed)} of {show_count(merged.tensors)} tensors changed, {show_bytes(merged.bytes)} of "
        "weights written"
    )
    if merged.largest_in:
        print(f"largest change: |W' - W| / |W| = {merged.largest:.3g} in {merged.largest_in}")
