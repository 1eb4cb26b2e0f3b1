"""The errors a user may see.

Each class carries the exit code of the command that ends with it; ``str(error)`` is the one paragraph shown:
the values, the rule they break, the remedy.
"""

from __future__ import annotations


class ShardyardError(Exception):
    """Base of every error that is shown as one paragraph instead of a traceback."""

    exit_code: int = 1


class RunFailed(ShardyardError):
    """A run ended without reaching its last step."""

    exit_code = 1


class PeerFailed(ShardyardError):
    """Another rank failed, and reports the cause itself."""

    exit_code = 1


class UsageError(ShardyardError):
    """A bad config, bad arguments, or a combination that is refused."""

    exit_code = 2


class Unreachable(ShardyardError):
    """A backend is out of reach: no Ray, no free resources, no store."""

    exit_code = 3


class NotFound(ShardyardError):
    """No such run, checkpoint, recipe or file."""

    exit_code = 4


class TimedOut(ShardyardError):
    """Something did not happen within its time limit."""

    exit_code = 5


class Interrupted(ShardyardError):
    """A foreground run was stopped by Ctrl-C; it is saved and can be resumed."""

    exit_code = 130


class Preempted(Interrupted):
    """A run was told to make room (SIGTERM, SIGUSR1); it is saved, and whoever scheduled it should start it again.

    The code is EX_TEMPFAIL of sysexits.h, "try again later".
    """

    exit_code = 75


class Damaged(ShardyardError):
    """A file fails its digest, or is truncated."""

    exit_code = 1
