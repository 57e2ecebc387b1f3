"""Errors that a person can act on, printed as one line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input: the message names the key or file, the value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown, has a wrong type or value, or does not fit another key."""


class ModelError(UserError):
    """A model directory is missing, damaged, or of an architecture that is not supported."""


class CheckpointError(UserError):
    """A training checkpoint is missing, damaged, or belongs to another model or run."""
