# SPDX-License-Identifier: Apache-2.0
"""How a frozen weight is kept: see `stored`, and a module for each format."""
