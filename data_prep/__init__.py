# SPDX-License-Identifier: Apache-2.0
"""Raw public data sets to checksummed Parquet: `python -m data_prep --help`."""
