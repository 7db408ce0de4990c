# SPDX-License-Identifier: Apache-2.0
"""The training loop, one step of it, and the optimizers it can drive."""
