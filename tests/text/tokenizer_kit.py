"""Small tokenizers of each kind of decoder, with special tokens."""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from headrace.text.detokenizer import BYTE_OF
from headrace.text.tokenizer import Tokenizer

SPECIAL = ["<s>", "<|user|>", "<|assistant|>"]


def byte_level() -> Tokenizer:
    """Every byte, and merges that cut characters in the middle, after a space too."""
    alphabet = {byte: character for character, byte in BYTE_OF.items()}
    vocab = {alphabet[byte]: byte for byte in range(256)}
    merges = []

    def merge(*parts: bytes) -> None:
        left, right = ("".join(alphabet[b] for b in part) for part in parts)
        vocab[left + right] = len(vocab)
        merges.append((left, right))

    merge(b"t", b"h")
    merge(b"th", b"e")
    merge(b" ", b"the")
    merge(b" ", b"\xf0")
    merge(b" \xf0", b"\x9f")
    merge(b"\xc3", b"\xa9")
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return _with_special(backend)


def sentencepiece() -> Tokenizer:
    """Llama's: a space before the first word, bytes for unknown characters, a token that starts every text."""
    vocab = {"<unk>": 0}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzONDF.", "▁d", "▁day", "é"]:
        vocab[piece] = len(vocab)
    for piece in ("ay", "ne", "On", "One", "▁One"):
        vocab[piece] = len(vocab)
    merges = [("▁", "d"), ("a", "y"), ("▁d", "ay"), ("n", "e"), ("O", "ne"), ("▁", "One")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = _with_special(backend)
    start = made.token_id("<s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", start)])
    return made


def metaspace() -> Tokenizer:
    """Its decoder is none of the two known kinds."""
    words = ["▁", "▁the", "▁cat", "s", "▁é", "漢", "<unk>"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _with_special(backend)


def _with_special(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return Tokenizer(backend, {"bos_token": "<s>"})


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}
