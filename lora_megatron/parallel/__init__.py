# SPDX-License-Identifier: Apache-2.0
"""Process groups, devices and what ranks agree on."""
