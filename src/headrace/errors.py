"""Errors that a user's input causes. Each message states what to do."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["CheckpointError", "ConfigError", "HeadraceError", "RequestError", "renamed_fields"]


class HeadraceError(ValueError):
    """Wrong input. The command line prints the message as one line and exits with code 2."""


class CheckpointError(HeadraceError):
    """A model folder cannot be loaded: the message names the file, tensor or field."""


class ConfigError(HeadraceError):
    """A configuration value is impossible: the message names the field and what it may be."""


class RequestError(HeadraceError):
    """A request cannot be served: the message names the field at fault, with the numbers.

    `param` is that field, None where there is none. `code` is OpenAI's name of the mistake, where it has one.
    """

    template: str | None = None
    """The message with {field} for the name of each field and {} for each of `values`; None: it names no field."""
    values: tuple[str, ...] = ()

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    @classmethod
    def about(cls, param: str, template: str, *values: object, code: str | None = None) -> RequestError:
        """Build an error from a template, so that `renamed` can put other names of fields into it."""
        return cls._of(template, tuple(map(str, values)), param, code, {})

    def renamed(self, names: Mapping[str, str]) -> RequestError:
        """The same error with other names of fields, in `param` and in the message."""
        param = None if self.param is None else names.get(self.param, self.param)
        if self.template is None:
            return type(self)(str(self), param, self.code)
        return self._of(self.template, self.values, param, self.code, names)

    @classmethod
    def _of(
        cls, template: str, values: tuple[str, ...], param: str | None, code: str | None, names: Mapping[str, str]
    ) -> RequestError:
        error = cls(_FieldNames().vformat(template, values, names), param, code)
        error.template, error.values = template, values
        return error


class _FieldNames(string.Formatter):
    """Of fields without another name, their own."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[key] if isinstance(key, int) else kwargs.get(key, key)


@contextlib.contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Any `RequestError` of the block names fields as the caller of this code does. `names`: from this code's names."""
    try:
        yield
    except RequestError as error:
        raise error.renamed(names) from None
