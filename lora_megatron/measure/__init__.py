# SPDX-License-Identifier: Apache-2.0
"""What a run costs and how it went: memory by kind, environment, metrics, progress, reports."""
