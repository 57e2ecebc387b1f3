"""Errors a user can act on. They are printed as one line, without a traceback."""


class UserError(Exception):
    """Wrong input: the message names the key or file, the value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown, has a wrong type or value, or does not fit another key."""


class DataError(UserError):
    """A dataset is missing, empty or has a row that cannot be used."""


class ModelError(UserError):
    """A model directory is missing, damaged, or of an architecture that is not supported."""


class CheckpointError(UserError):
    """A training checkpoint is missing, damaged, or belongs to another model or run."""


class TrainingError(UserError):
    """Training cannot go on: too many bad steps in a row, or a peer process is gone."""


class EngineError(UserError):
    """An inference engine cannot be started or reached, serves another model, or refused what it was asked."""


class JudgeError(UserError):
    """The judge model of evaluations refuses what it is asked, or gives no answer."""


class EngineLost(EngineError):
    """An engine that had served is gone for good, or has generated nothing for too long."""
