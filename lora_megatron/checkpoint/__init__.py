# SPDX-License-Identifier: Apache-2.0
"""What is written and read: base models, adapters, training state. safetensors and JSON only, never pickle."""
