# SPDX-License-Identifier: Apache-2.0
"""A whole small experiment in minutes: `lora-megatron quickstart`."""

from lora_megatron.quickstart.experiment import run_quickstart

__all__ = ["run_quickstart"]
