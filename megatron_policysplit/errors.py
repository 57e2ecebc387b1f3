"""Errors that a user can act on, printed as one line without a traceback, and the exit codes.

Those of models, checkpoints and configuration come from `checkpoints_conv`, which stands alone.
"""

import re

from checkpoints_conv.errors import CheckpointError, ConfigError, ModelError, UserError

__all__ = [
    "BAD_INPUT",
    "DOCTOR",
    "DONE",
    "FAILED",
    "STOPPED",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "EngineLost",
    "JudgeError",
    "MachineError",
    "ModelError",
    "PortError",
    "TrainingError",
    "UserError",
    "WriteError",
    "cannot_load",
    "machine_hint",
]

# Exit codes of every process.
DONE = 0  # all that was asked for is done
FAILED = 1  # training cannot go on: bad steps in a row, a lost peer, or a defect of the program
BAD_INPUT = 2  # the configuration or a file is wrong; one sentence on stderr says what
STOPPED = 75  # stopped by a signal with its state saved; the same command goes on (EX_TEMPFAIL)


def cannot_load(what: str, path: object, error: BaseException) -> ModelError:
    """The ModelError for what transformers raised when it read `what` of a directory.

    transformers raises many kinds of error, some over several lines, and a KeyError says no more
    than the key.
    """
    text = " ".join(str(error).split()) or "no reason given"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return ModelError(f"cannot load the {what} in {path}: {kind}{text}")


# What the message of an error that the machine is the cause of ends with.
DOCTOR = "`policysplit doctor` examines this machine"


class MachineError(ConfigError):
    """A run cannot start because of what is, or is not, on this machine or between nodes."""

    def __str__(self) -> str:
        return f"{super().__str__()} ({DOCTOR})"


def machine_hint(error: BaseException) -> str:
    """`; ...` where a GPU, its memory or its libraries are why a rank could not start, else ""."""
    is_of_gpu = re.search(r"\b(CUDA|NCCL|NVML|NVIDIA|cuBLAS|CUBLAS|cuDNN|CUDNN)", str(error))
    return f"; {DOCTOR}" if is_of_gpu else ""


class DataError(UserError):
    """A dataset is missing, empty or has a row that cannot be used."""


class TrainingError(UserError):
    """Training cannot go on: too many bad steps in a row, or a peer process is gone.

    A UserError although no input need be wrong: it is said in one sentence, without a traceback,
    and `distributed.agree` hands it to the other ranks as it is.
    """


class EngineError(UserError):
    """An engine cannot be started or reached, serves another model, or refuses a request."""


class PortError(EngineError, MachineError):
    """An engine's port cannot be listened on."""


class JudgeError(UserError):
    """The judge model of evaluations refuses what it is asked, or gives no answer."""


class EngineLost(EngineError):
    """An engine that had served is gone for good, or has generated nothing for too long."""


class WriteError(UserError):
    """A file cannot be written: its disk is full, over quota, read-only or failing.

    A UserError although no input need be wrong. Its exit code is FAILED: what was asked for had
    begun, and the same command goes on once there is room.
    """
