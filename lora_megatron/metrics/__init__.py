# SPDX-License-Identifier: Apache-2.0
"""Scores of generated texts, as the official scripts of the paper's tasks define them. Nothing here imports torch."""
