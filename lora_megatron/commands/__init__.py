# SPDX-License-Identifier: Apache-2.0
"""What the command line can do, one module per command."""
