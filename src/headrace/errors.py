"""Errors that a user's input causes. Each message states what to do."""

__all__ = ["CheckpointError", "ConfigError", "HeadraceError", "RequestError"]


class HeadraceError(ValueError):
    """Wrong input. The command line prints the message as one line and exits with code 2."""


class CheckpointError(HeadraceError):
    """A model folder cannot be loaded: the message names the file, tensor or field."""


class ConfigError(HeadraceError):
    """A configuration value is impossible: the message names the field and what it may be."""


class RequestError(HeadraceError):
    """A request cannot be served: the message names the parameter, with the numbers."""
