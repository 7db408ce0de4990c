# SPDX-License-Identifier: Apache-2.0
"""How to adapt: one small file per method, each a value that says what is adapted and what is trained."""
