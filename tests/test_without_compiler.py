# SPDX-License-Identifier: Apache-2.0
"""On a machine without a GPU a command does not wait for torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

CHECK = """
import sys
import lora_megatron.commands.train
from megatron.core import jit
assert jit.jit_fuser is jit.noop_decorator, jit.jit_fuser
print([name for name in ("torch._inductor.compile_fx", "torch._dynamo", "nltk", "matplotlib") if name in sys.modules])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the fused functions are compiled")
def test_nothing_slow_is_loaded_before_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
