# SPDX-License-Identifier: Apache-2.0
"""What a user can do wrong, one class per exit status.

Every error a user can cause ends as ONE line on stderr that names the value and the remedy, and as the exit
status below. Anything else that escapes is a bug and keeps its traceback.

| status | meaning                                          |
|--------|--------------------------------------------------|
| 0      | done                                             |
| 2      | configuration                                    |
| 3      | data                                             |
| 4      | checkpoint, adapter or base weights; disk        |
| 5      | numerical (a loss or gradient is not finite)     |
| 6      | hang (kept free; nothing reports it yet)         |
| 75     | preempted (kept free; nothing reports it yet)    |
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_PREEMPTED = 75


class UserError(ValueError):
    """Something the user can mend; `exit_status` is what the process ends with."""

    exit_status = 2


class ConfigError(UserError):
    """A configuration value or a combination of values cannot work."""

    exit_status = 2


class DataError(UserError):
    """A data file, manifest or tokenizer is missing, damaged or empty."""

    exit_status = 3


class CheckpointError(UserError):
    """A checkpoint, an adapter or base weights are missing, damaged, or belong to something else."""

    exit_status = 4


class NumericalError(UserError):
    """Training produced a value that is not finite."""

    exit_status = 5


EXIT_STATUS_BY_NAME = {
    error.__name__: error.exit_status for error in (ConfigError, DataError, CheckpointError, NumericalError)
}
