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
| 6      | a rank hangs, or contact with one is lost        |
| 75     | preempted: a termination signal; start it again  |
| 130    | interrupted: Ctrl-C in any command but `train`   |
| 141    | what reads the output has gone (`... | head`)    |
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended
EXIT_BROKEN_PIPE = 128 + 13  # and one that SIGPIPE ended


class UserError(ValueError):
    """Something the user can mend; `exit_status` is what the process ends with."""

    exit_status = 2
    told_by = "main"
    """Who prints it: `main` (all ranks raise it alike, and rank 0 speaks), the first of each `node`, or each `rank`."""


class ConfigError(UserError):
    """A configuration value or a combination of values cannot work."""

    exit_status = 2


class JoinError(ConfigError):
    """This process cannot take its place among the ranks, so that it can agree on nothing with them."""

    told_by = "node"


class DataError(UserError):
    """A data file, manifest or tokenizer is missing, damaged or empty."""

    exit_status = 3


class CheckpointError(UserError):
    """A checkpoint, an adapter or base weights are missing, damaged, or belong to something else."""

    exit_status = 4


class NumericalError(UserError):
    """Training produced a value that is not finite."""

    exit_status = 5


class LostRankError(UserError):
    """A rank hangs, was killed, or its machine is gone: what it has to say can no longer be agreed on."""

    exit_status = 6
    told_by = "rank"  # rank 0 may be the one that is lost


class OutOfMemoryAlone(LostRankError):
    """This rank ran out of memory while others may wait for it in a collective: it says so itself, and at once ends.

    torchrun then ends the others.
    """

    exit_status = 2


class Preempted(Exception):
    """A termination signal (its name) stopped the run on all ranks together: no error, and there is more to do."""

    exit_status = EXIT_PREEMPTED

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal
        self.step: int | None = None
        """Where the run stands; None before that is known."""
        self.saved: str | None = None
        """The checkpoint of that step."""

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.signal} came before anything began: start the same command again"
        where = f"saved in {self.saved}" if self.saved else "nothing to save"
        return f"{self.signal} stopped the run at step {self.step} ({where}): go on with run.resume=auto"


EXIT_STATUS_BY_NAME = {
    error.__name__: error.exit_status
    for error in (ConfigError, DataError, CheckpointError, NumericalError, LostRankError)
}
