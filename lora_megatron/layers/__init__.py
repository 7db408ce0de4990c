# SPDX-License-Identifier: Apache-2.0
"""Layers that take numbers and callables, never configuration objects of this project."""
