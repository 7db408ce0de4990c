# SPDX-License-Identifier: Apache-2.0
"""The tiny Hugging Face models of tests/huggingface, here too."""

from tests.huggingface.conftest import saved

__all__ = ["saved"]
