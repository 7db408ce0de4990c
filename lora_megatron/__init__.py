# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning inside a Megatron-Core GPT: exact under every parallel layout."""

__version__ = "0.1.0"
