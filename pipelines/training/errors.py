"""How a run ends that cannot continue, other than by its configuration (`ConfigError`)."""

from __future__ import annotations

import errno

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class TrainingError(RuntimeError):
    """Another try would end the same way. The message says what a person can do; a traceback would add nothing to it."""


class NonFiniteError(TrainingError):
    """The loss or a gradient is infinite or not a number. The step was not taken."""


def unwritable(error: BaseException) -> str | None:
    """Why a storage takes no more files, if that is what an error says."""
    return error.strerror if isinstance(error, OSError) and error.errno in UNWRITABLE else None


def passing(error: BaseException) -> bool:
    """Whether a storage may answer better another time."""
    return isinstance(error, OSError) and unwritable(error) is None
