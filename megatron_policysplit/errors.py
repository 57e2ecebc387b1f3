"""Errors a user can act on, printed as one line without a traceback, and the exit codes of every
process.
"""

from checkpoints_conv.errors import CheckpointError, ConfigError, ModelError, UserError

__all__ = [
    "BAD_INPUT",
    "DONE",
    "FAILED",
    "STOPPED",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "EngineLost",
    "JudgeError",
    "ModelError",
    "TrainingError",
    "UserError",
]

DONE = 0  # All that was asked for is done.
FAILED = (
    1  # Training cannot go on: bad steps in a row, a peer that is gone, or a defect of the program.
)
BAD_INPUT = 2  # Something that was given is wrong; one sentence on stderr says what.
STOPPED = 75  # A signal stopped it, its state is saved, and the same command goes on (EX_TEMPFAIL).


class DataError(UserError):
    """A dataset is missing, empty or has a row that cannot be used."""


class TrainingError(UserError):
    """Training cannot go on: too many bad steps in a row, or a peer process is gone."""


class EngineError(UserError):
    """An inference engine cannot be started or reached, serves another model, or refused what it
    was asked.
    """


class JudgeError(UserError):
    """The judge model of evaluations refuses what it is asked, or gives no answer."""


class EngineLost(EngineError):
    """An engine that had served is gone for good, or has generated nothing for too long."""
