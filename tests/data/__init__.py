# SPDX-License-Identifier: Apache-2.0
"""Tests of data preparation, reading and batching."""
