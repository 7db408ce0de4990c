# SPDX-License-Identifier: Apache-2.0
"""Tests of decoding and of the commands that decode."""
