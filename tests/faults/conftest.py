# SPDX-License-Identifier: Apache-2.0
"""The same corpus and threads as the tests of the commands."""

from tests.commands.conftest import corpus, one_thread

__all__ = ["corpus", "one_thread"]
