"""The tokenizer of a model folder: tokenizer.json, with the settings in tokenizer_config.json.

Ids equal those of `transformers.AutoTokenizer`, so the rules below about which file wins are its rules.
tokenizer.json's post-processor adds the special tokens; `add_bos_token` in tokenizer_config.json does not change it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend

from headrace.errors import CheckpointError, RequestError
from headrace.text.chat import ChatTemplate
from headrace.text.detokenizer import Detokenizer, PieceTable, piece_bytes

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
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: convert the tokenizer with transformers' "
                "save_pretrained, or copy the file beside the weights"
            )
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
        _add_missing_tokens(backend, config, special)
        if _rebuilt_as_llama(backend, config, _read_json(folder / "config.json")):
            _rebuild_as_llama(backend, config)
        return cls(backend, special, _chat_template(folder, config), source=str(folder), config=config)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

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

    def detokenizer(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """An incremental decoder of what follows `prompt_ids`."""
        return Detokenizer(self._table, skip_special_tokens, prompt_ids)

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


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … as text. Each may be a string or an added token's fields."""
    special = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        value = special_map.get(name) if value is None else value
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            special[name] = value
    return special


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Append the tokens that the configuration names and tokenizer.json lacks, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, token in declared:
        if token["content"] not in known:
            backend.add_tokens([AddedToken(token["content"], **{k: token[k] for k in fields if k in token})])
    for text in special.values():
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _rebuilt_as_llama(backend: Backend, config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether AutoTokenizer ignores this tokenizer.json's normalizer and takes its own Llama pipeline."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if name != "LlamaTokenizer" or model.get("model_type", "llama") != "llama":
        return False
    pipeline = json.loads(backend.to_str())
    return pipeline["model"].get("type") == "BPE" and '"ByteLevel"' not in json.dumps(
        [pipeline["pre_tokenizer"], pipeline["decoder"]]
    )


def _rebuild_as_llama(backend: Backend, config: Mapping[str, Any]) -> None:
    prefix_space = config.get("add_prefix_space")
    prefix_space = True if prefix_space is None else bool(prefix_space)
    scheme = ("always" if config.get("legacy", False) else "first") if prefix_space else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    chain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        chain.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(chain)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """chat_template.jinja wins over tokenizer_config.json, whose value may be a list of named templates."""
    file = folder / "chat_template.jinja"
    named = {
        extra.stem: extra.read_text(encoding="utf-8")
        for extra in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if file.is_file():
        source = file.read_text(encoding="utf-8")
        return {**named, "default": source} if named else source
    value = config.get("chat_template")
    if isinstance(value, list):
        try:
            return {entry["name"]: entry["template"] for entry in value} | named
        except (TypeError, KeyError):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a "
                "list of objects with name and template"
            ) from None
    if value is not None and not isinstance(value, (str, dict)):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list")
    return value or named or None


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
