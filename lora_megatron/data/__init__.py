# SPDX-License-Identifier: Apache-2.0
"""Prepared Parquet files to micro-batches: tokenizers, checked tables, encoding, packing, batching."""
