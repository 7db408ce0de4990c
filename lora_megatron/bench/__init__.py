# SPDX-License-Identifier: Apache-2.0
"""Methods side by side on the same shards, data and steps: speed, memory by kind, TFLOP/s, plan against measurement."""
