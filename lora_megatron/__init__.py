# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning inside a Megatron-Core GPT: exact under every parallel layout."""

import logging
import warnings

from lora_megatron import without_compiler

__version__ = "0.1.0"

# megatron-core announces the absence of optional libraries at every import, once per rank; where it matters, our own
# messages say so.
for _notice in (
    "Transformer Engine and Apex",
    "Apex is not installed",
    "full scope is deprecated",
    "On CPU",
    "MimoModelConfig is experimental",
    ".*all_gather_into_tensor",
):
    warnings.filterwarnings("ignore", message=_notice)
logging.getLogger("megatron.core").setLevel(logging.ERROR)
without_compiler.install()
