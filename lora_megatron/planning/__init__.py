# SPDX-License-Identifier: Apache-2.0
"""What a training will need before any GPU is touched: memory, files, FLOPs, time, and layouts that fit."""
