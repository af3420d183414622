"""The tokenizer of a model folder: tokenizer.json, with the settings in tokenizer_config.json.

Ids equal those of `transformers.AutoTokenizer`, so the rules below about which file wins are its rules.
tokenizer.json's post-processor adds the special tokens; `add_bos_token` in tokenizer_config.json does not change it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend

from headrace.errors import CheckpointError, ConfigError, RequestError
from headrace.text.chat import ChatTemplate
from headrace.text.detokenizer import Detokenizer, PieceTable, piece_bytes
from headrace.typed import expanded, read_fields, read_json, read_value

__all__ = ["Tokenizer"]

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILE_NAMES = frozenset({"vocab_file", "merges_file", "tokenizer_file", "name_or_path"})


class Tokenizer:
    """Text to ids and back, plus the chat template. Immutable once made; safe to share."""

    def __init__(
        self,
        backend: Backend,
        special: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        source: str = "the tokenizer",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`config` is tokenizer_config.json's."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = dict(special or {})
        self._source = source
        self._config = dict(config or {})
        self._chat = ChatTemplate(chat_template, self._special) if chat_template else None
        self._table = _piece_table(backend)
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a model folder. Raises `CheckpointError` that names the file at fault."""
        folder = expanded(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: convert the tokenizer with transformers' "
                "save_pretrained, or copy the file beside the weights"
            )
        try:
            backend = Backend.from_str(_read_text(file))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from None
        written = folder / "tokenizer_config.json"
        settings = _settings(written)
        special = _special_tokens(settings, _settings(folder / "special_tokens_map.json"))
        _add_missing_tokens(backend, settings, special)
        model = folder / "config.json"
        model_type = (read_json(model) if model.is_file() else {}).get("model_type") or "llama"
        if _rebuilt_as_llama(backend, settings, model_type):
            _rebuild_as_llama(backend, settings)
        return cls(
            backend,
            special,
            _chat_template(folder, settings),
            source=str(folder),
            config=read_json(written) if written.is_file() else None,
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """The id that starts a text, if the tokenizer names one."""
        return self.token_id(self._special.get("bos_token"))

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if the tokenizer names one."""
        return self.token_id(self._special.get("eos_token"))

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._chat is not None

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises `RequestError` where it has none."""
        if self._chat is None:
            raise RequestError(
                f"{self._source} has no chat template: send a plain prompt instead, or put a "
                "chat_template.jinja beside its tokenizer.json",
                "messages",
            )
        return self._chat

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, … as text, for chat templates."""
        return self._special

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of a text."""
        return self._table.special_ids

    def info(self) -> dict[str, Any]:
        """tokenizer_config.json as it applies: with the special tokens and the chat template, without file names."""
        config = {name: value for name, value in self._config.items() if name not in FILE_NAMES}
        config |= self._special
        if self._chat is not None:
            config["chat_template"] = self._chat.source
        return {"tokenizer_class": "PreTrainedTokenizerFast", **config}

    def token_id(self, token: str | None) -> int | None:
        """The id of a token by its text in the vocabulary, None if there is none."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the tokenizer's start and end tokens where `add_special_tokens`."""
        # encode holds the interpreter's lock, for seconds with a long text; encode_batch_fast releases it.
        return self._encoded(self._backend.encode_batch_fast, text, add_special_tokens).ids

    def spell(self, text: str) -> list[int]:
        """Ids of `text`, in which the texts of special tokens are ordinary text."""
        return self._encoded(self._plain.encode_batch_fast, text, False).ids

    @cached_property
    def _plain(self) -> Backend:
        copy = Backend.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode_with_spans(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and for each the range of characters of `text` that the tokenizer made it of."""
        encoding = self._encoded(self._backend.encode_batch, text, add_special_tokens)
        return encoding.ids, encoding.offsets

    def _encoded(self, encode_batch: Callable[..., list[Encoding]], text: str, add_special_tokens: bool) -> Encoding:
        if not isinstance(text, str):
            raise RequestError.about("prompt", "{prompt} must be a string, not {}", type(text).__name__)
        try:
            return encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except (TypeError, UnicodeEncodeError):  # lone surrogates cannot cross into the library
            reason = "{prompt} holds a lone surrogate, which is not a character: send valid Unicode"
            raise RequestError.about("prompt", reason) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids` on their own. Unknown ids give no text."""
        [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int, opens: bool = False) -> bytes:
        """The bytes that a token stands for in the middle of a text, or where it `opens` a whole text.

        The bytes of a text's tokens add up to the text.
        """
        raw = piece_bytes(self._table, token_id)
        if not opens or self._table.kind == "bytes" or not raw.startswith(b" "):
            return raw
        return raw if self._table.decode([token_id]) == raw.decode(errors="replace") else raw[1:]

    def token_text(self, token_id: int, opens: bool = False) -> str:
        """The text of `token_bytes`, to show beside a log-probability. Part of a character shows as U+FFFD."""
        return self.token_bytes(token_id, opens).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The entries of the vocabulary, as its file has them; "" for an id without one."""
        return [self._backend.id_to_token(token_id) or "" for token_id in ids]

    def detokenizer(
        self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = (), shown_ids: Collection[int] = ()
    ) -> Detokenizer:
        """An incremental decoder of what follows `prompt_ids`. Special tokens of `shown_ids` are shown all the same."""
        return Detokenizer(self._table, skip_special_tokens, prompt_ids, shown_ids)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation. Encode it with `add_special_tokens=False`.

        Raises `RequestError` where the model has no chat template or the messages do not suit it.
        """
        return self.chat_template.render(messages, add_generation_prompt, **variables)

    def check_vocabulary(self, model_vocab: int) -> None:
        """Raise `CheckpointError` if this tokenizer has ids that a model of `model_vocab` tokens lacks."""
        if self.vocab_size > model_vocab:
            raise CheckpointError(
                f"{self._source}: the tokenizer has {self.vocab_size} tokens but the "
                f"model's vocabulary has {model_vocab}: put the model's own tokenizer into the folder"
            )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by transformers' AutoTokenizer."""
        target = Path(folder)
        self._backend.save(str(target / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._special,
            "clean_up_tokenization_spaces": False,
        }
        if self._chat is not None:
            config["chat_template"] = self._chat.source
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Token:
    """An added token in tokenizer_config.json."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def added(self) -> AddedToken:
        fields = dataclasses.asdict(self)
        return AddedToken(**{name: value for name, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True)
class _Template:
    """One of several chat templates."""

    name: str
    template: str


_Special = str | _Token | None


@dataclass(frozen=True, slots=True)
class _Settings:
    """What is read of tokenizer_config.json; the special tokens also of special_tokens_map.json."""

    bos_token: _Special = None
    eos_token: _Special = None
    unk_token: _Special = None
    sep_token: _Special = None
    pad_token: _Special = None
    cls_token: _Special = None
    mask_token: _Special = None
    added_tokens_decoder: Mapping[str, _Token] = field(default_factory=dict)
    tokenizer_class: str = ""
    add_prefix_space: bool = True
    legacy: bool = False
    chat_template: str | tuple[_Template, ...] | Mapping[str, str] = ""


def _settings(file: Path) -> _Settings:
    if not file.exists():
        return _Settings()
    try:
        settings = read_fields(_Settings, read_json(file), loose=True)
        for key in settings.added_tokens_decoder:
            read_value(int, int(key) if key.isdecimal() else key, "added_tokens_decoder: the token id")
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return settings


def _special_tokens(*sources: _Settings) -> dict[str, str]:
    """bos_token, eos_token, … as text, of the first file that has it."""
    special = {}
    for name in SPECIAL_NAMES:
        value = next((found for source in sources if (found := getattr(source, name)) is not None), None)
        if value is not None:
            special[name] = value.content if isinstance(value, _Token) else value
    return special


def _add_missing_tokens(backend: Backend, settings: _Settings, special: Mapping[str, str]) -> None:
    """Append the tokens that the configuration names and tokenizer.json lacks, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(settings.added_tokens_decoder.items(), key=lambda item: int(item[0])):
        if token.content not in known:
            backend.add_tokens([token.added()])
    for text in special.values():
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _rebuilt_as_llama(backend: Backend, settings: _Settings, model_type: str) -> bool:
    """Whether AutoTokenizer ignores this tokenizer.json's normalizer and takes its own Llama pipeline."""
    if settings.tokenizer_class.removesuffix("Fast") != "LlamaTokenizer" or model_type != "llama":
        return False
    pipeline = json.loads(backend.to_str())
    return pipeline["model"].get("type") == "BPE" and '"ByteLevel"' not in json.dumps(
        [pipeline["pre_tokenizer"], pipeline["decoder"]]
    )


def _rebuild_as_llama(backend: Backend, settings: _Settings) -> None:
    prefix_space = settings.add_prefix_space
    scheme = ("always" if settings.legacy else "first") if prefix_space else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    chain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        chain.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(chain)


def _chat_template(folder: Path, settings: _Settings) -> str | dict[str, str] | None:
    """chat_template.jinja wins over tokenizer_config.json, whose value may be a list of named templates."""
    file = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = {extra.stem: _read_text(extra) for extra in more}
    if file.is_file():
        source = _read_text(file)
        return {**named, "default": source} if named else source
    value = settings.chat_template
    if isinstance(value, tuple):
        return {entry.name: entry.template for entry in value} | named
    return (value if isinstance(value, str) else dict(value)) or named or None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _piece_table(backend: Backend) -> PieceTable:
    decoder = json.loads(backend.to_str())["decoder"] or {}
    chain = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step.get("type") for step in chain]
    strip = kinds[-1:] == ["Strip"]
    kind = "window"
    if kinds == ["ByteLevel"]:
        kind = "bytes"
    elif kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _is_sentencepiece(chain):
        kind = "fallback"
    special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    return PieceTable(
        kind, backend.id_to_token, lambda ids: backend.decode(ids, skip_special_tokens=False), special, strip
    )


def _is_sentencepiece(chain: Sequence[Mapping[str, Any]]) -> bool:
    replace, rest = chain[0], chain[3:]
    one_space = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return replace.get("pattern") == {"String": "▁"} and replace.get("content") == " " and list(rest) in ([], one_space)
