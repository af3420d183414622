"""Chat templates: Jinja programs that come with a model folder, so they run in a sandbox.

The dialect is the one `transformers` defines: immutable sandbox, trimmed blocks, loop controls, a
`generation` tag, `raise_exception`, `strftime_now`, and a `tojson` that does not escape HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from headrace.errors import CheckpointError, HeadraceError, RequestError

__all__ = ["ChatTemplate"]

MAX_CHARACTERS = 16 * 1024 * 1024
"""Longest rendering and longest string that a template may build by repetition."""

MAX_BITS = 4096
"""Longest integer that a template may build by powers."""

REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class _RefusedMessages(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, which also bounds what `*` and `**` can build."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        integers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and integers and left.bit_length() * right > MAX_BITS:
            raise jinja2.exceptions.SecurityError("a power with more digits than any prompt needs")
        for sized, count in ((left, right), (right, left)):
            if hasattr(sized, "__len__") and isinstance(count, int) and len(sized) * count > MAX_CHARACTERS:
                raise jinja2.exceptions.SecurityError("a repetition longer than any prompt")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise _RefusedMessages(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A model's chat template, or its named templates, compiled at first use.

    `source` is one template or a mapping of names to templates, of which "tool_use" serves requests with
    tools and "default" the others. `variables` are the special tokens that templates may name (bos_token, …).
    """

    def __init__(self, source: str | Mapping[str, str], variables: Mapping[str, Any] | None = None) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._variables = dict(variables or {})
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def source(self) -> str | list[dict[str, str]]:
        """The template as tokenizer_config.json writes it."""
        if list(self._sources) == ["default"]:
            return self._sources["default"]
        return [{"name": name, "template": text} for name, text in self._sources.items()]

    @property
    def sources(self) -> Mapping[str, str]:
        """The templates by name; one alone is called "default"."""
        return self._sources

    def uses(self, name: str) -> bool:
        """Whether the template for requests without tools reads a variable that is not set in it."""
        self._template("default")
        tree = _environment().parse(self._sources["default"])
        return name in jinja2.meta.find_undeclared_variables(tree)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Raises `RequestError` where the messages do not suit the template, `CheckpointError` where the
        template itself is broken or tries to leave the sandbox.
        """
        chat = _plain(_checked(messages))
        template = self._template("tool_use" if tools and "tool_use" in self._sources else "default")
        names = {
            **self._variables,
            **_plain(variables),
            "messages": chat,
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(template, names)
        except _RefusedMessages as refused:
            raise RequestError(f"messages: the model's chat template refuses them: {refused}", "messages") from None
        except jinja2.exceptions.SecurityError as error:
            raise CheckpointError(f"the model's chat template is refused as unsafe: {error}") from None
        except HeadraceError:
            raise
        except jinja2.UndefinedError as error:
            raise RequestError(
                f"messages: the model's chat template uses a field that they lack: {error}", "messages"
            ) from None
        except Exception as error:
            raise RequestError(
                f"messages: the model's chat template failed on them: {type(error).__name__}: {error}", "messages"
            ) from None

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._sources:
            raise CheckpointError(
                f"the model has chat templates named {', '.join(sorted(self._sources))}, but none named {name}"
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._sources[name])
            except (jinja2.TemplateSyntaxError, RecursionError) as error:
                raise CheckpointError(f"the model's chat template does not compile: {error}") from None
        return self._compiled[name]


def _bounded(template: jinja2.Template, names: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    total = 0
    for piece in template.generate(**names):
        pieces.append(piece)
        total += len(piece)
        if total > MAX_CHARACTERS:
            raise jinja2.exceptions.SecurityError(f"it writes more than {MAX_CHARACTERS} characters")
    return "".join(pieces)


def _checked(messages: Any) -> list[Mapping[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list of objects with role and content", "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{i}] must be an object with a role (a string) and content", "messages")
    return [_without_none(message) for message in messages]


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop null values, as templates test whether a key is there, and give reasoning under both names in use."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING_NAMES if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Copy into plain containers and scalars, so that a template cannot reach other objects of this process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise RequestError(f"messages: a chat template takes plain JSON values, not {type(value).__name__}", "messages")
