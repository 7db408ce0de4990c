# SPDX-License-Identifier: Apache-2.0
"""Hypothesis without deadlines: on a busy machine they fail tests that are right."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
