# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints in, merged checkpoints and PEFT adapters out."""
