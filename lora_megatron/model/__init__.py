# SPDX-License-Identifier: Apache-2.0
"""Shapes, presets, and the megatron-core GPT that is built from them."""
