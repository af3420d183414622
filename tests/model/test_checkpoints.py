"""Checkpoint folders: read and written bit for bit; a broken one is refused by the name of what is broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

from headrace.errors import CheckpointError, HeadraceError
from headrace.model.folder import read_config, resolve
from headrace.model.huggingface import load_model, save_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILIES = [
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
    (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    ("Mistral", {"sliding_window": 9}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("Qwen3", {"head_dim": 32, "eos_token_id": None}),
]


def tensors(model):
    return [(name, piece.tensor) for name, piece in model.tensors()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_round_trip(family, changes, dtype, tmp_path, reference_ops, checkpoint, load_peer):
    folder, peer = checkpoint(family, dtype=dtype, **changes)
    model = load_model(folder, reference_ops)
    save_model(model, tmp_path / "saved", {"headrace": {"note": "kept"}})
    before = safetensors.torch.load_file(folder / SINGLE)
    after = safetensors.torch.load_file(tmp_path / "saved" / SINGLE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["headrace"] == {"note": "kept"}
    again = load_model(tmp_path / "saved", reference_ops)
    assert again.config == model.config
    for (name, a), (_, b) in zip(tensors(model), tensors(again), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    ids = torch.arange(40)[None] % 160
    with torch.no_grad():
        assert torch.equal(load_peer(tmp_path / "saved")(ids).logits, peer(ids).logits)


def test_tied_embeddings_are_written_once(tmp_path, reference_ops, checkpoint):
    folder, _ = checkpoint("Qwen2", tie_word_embeddings=True)
    save_model(load_model(folder, reference_ops), tmp_path)
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / SINGLE)


def test_trained_norms_are_not_rounded(tmp_path, reference_ops, checkpoint):
    folder, _ = checkpoint("Llama", dtype=torch.bfloat16)
    model = load_model(folder, reference_ops)
    model.norm.weight.add_(1e-5)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path, reference_ops).norm.weight, model.norm.weight)


def test_saving_over_a_folder_replaces_it(tmp_path, reference_ops, checkpoint):
    save_model(load_model(checkpoint("Llama", eos_token_id=5)[0], reference_ops), tmp_path)
    save_model(load_model(checkpoint("Qwen3", eos_token_id=None)[0], reference_ops), tmp_path)
    config = read_config(tmp_path)
    assert config.architecture == "Qwen3ForCausalLM" and config.eos_token_ids == ()
    load_model(tmp_path, reference_ops)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("mask", [0o027, 0o002, 0o077])
def test_saved_files_honour_the_umask(mask, tmp_path, reference_ops, checkpoint):
    model = load_model(checkpoint("Llama")[0], reference_ops)
    (tmp_path / "model.safetensors.partial").touch(0o600)
    before = os.umask(mask)
    try:
        save_model(model, tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~mask}


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / SINGLE)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / SINGLE, {"format": "pt"})

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def truncate(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


Q = "model.layers.1.self_attn.q_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
NORM = "model.norm.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
    "config not json": (write("config.json", b'{"vocab_size": '), r"config\.json is not valid JSON"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "config a list": (write("config.json", b"[1]"), r"config\.json must hold a JSON object, not list"),
    "bad generation config": (write("generation_config.json", b"{"), r"n_config\.json is not valid JSON"),
    "architecture": (edit_config(architectures=["GPT2LMHeadModel"]), r"config\.json: architectures=\['GPT2LMHead"),
    "dynamic rope": (
        edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        r"config\.json: rope scaling 'dynamic'",
    ),
    "quantized": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        r"config\.json: quantization_config \(gptq\)",
    ),
    "bad value": (edit_config(num_attention_heads=5), r"config\.json: num_attention_heads=5 is not a multiple"),
    "no weights": (
        lambda f: (f / SINGLE).unlink(),
        r"has neither model\.safetensors nor model\.safetensors\.index\.json$",
    ),
    "pickled weights": (pickled, "pickled weights are not read"),
    "truncated": (truncate, r"model\.safetensors is truncated or corrupt"),
    "empty": (write(SINGLE, b""), r"model\.safetensors is truncated or corrupt"),
    "corrupt header": (write(SINGLE, b"\x10" + bytes(7) + b"not a json header"), "is truncated or corrupt"),
    "huge header": (write(SINGLE, b"\xff" * 8 + b"{}"), "is truncated or corrupt"),
    "missing tensor": (edit_tensors(lambda t: t.pop(Q)), f"{Q} is missing from the checkpoint"),
    "missing tensors": (
        edit_tensors(lambda t: [t.pop(n) for n in list(t) if "layers.2" in n]),
        r"model\.layers\.2\..* \(and 8 more\) is missing",
    ),
    "missing head": (edit_tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "extra tensor": (
        edit_tensors(lambda t: t.update({BIAS: torch.ones(64)})),
        f"{BIAS} is in the checkpoint, but config.json describes a model without it",
    ),
    "misshapen": (
        edit_tensors(lambda t: t.update({Q: t[Q][:-1].clone()})),
        rf"{Q} has shape \[63, 64\], where config\.json makes it \[64, 64\]",
    ),
    "one axis more": (edit_tensors(lambda t: t.update({NORM: t[NORM][None].clone()})), rf"{NORM} has shape \[1, 64\]"),
    "wrong vocabulary": (edit_config(vocab_size=161), r"has shape \[160, 64\], where config.json makes it \[161"),
    "integers": (
        edit_tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        f"{Q} in .* is I8, not one of F32, BF16, F16",
    ),
    "double": (edit_tensors(lambda t: t.update({NORM: t[NORM].double()})), f"{NORM} in .* is F64"),
    "untied after all": (edit_config(tie_word_embeddings=True), r"lm_head\.weight differs from model\.embed_tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint_is_named(name, tmp_path, reference_ops, checkpoint, good):
    breaks, message = BROKEN[name]
    folder = shutil.copytree(good, tmp_path / "broken")
    breaks(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, reference_ops)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def good(checkpoint) -> Path:
    return checkpoint("Llama")[0]


@pytest.fixture(scope="module")
def sharded(checkpoint) -> Path:
    return checkpoint("Llama", shard="100KB")[0]


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-00002-*"))[0]


BROKEN_SHARDS = {
    "missing shard": (
        lambda f: second_shard(f).unlink(),
        r"model-00002-of-\d+\.safetensors is missing: model\.safetensors\.index\.json places",
    ),
    "truncated shard": (
        lambda f: second_shard(f).write_bytes(second_shard(f).read_bytes()[:500]),
        r"model-00002-of-\d+\.safetensors is truncated or corrupt",
    ),
    "no weight map": (write(INDEX, b"{}"), "has no weight_map"),
    "index not json": (write(INDEX, b"{"), r"index\.json is not valid JSON"),
    "path outside": (edit_index(lambda m: m.update({Q: "../other.safetensors"})), "which is not a file name"),
    "tensor elsewhere": (edit_index(lambda m: m.update({"model.more": m[Q]})), "lacks the tensor model.more"),
    "tensor unlisted": (edit_index(lambda m: m.pop(Q)), f"{Q} is missing from the checkpoint"),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_are_named(name, tmp_path, reference_ops, sharded):
    breaks, message = BROKEN_SHARDS[name]
    folder = shutil.copytree(sharded, tmp_path / "broken")
    breaks(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, reference_ops)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    ],
    ids=["tied copy", "tied by the other name", "rotary buffer"],
)
def test_harmless_extras_are_ignored(change, tmp_path, reference_ops, checkpoint):
    folder = checkpoint("Llama", tie_word_embeddings=True)[0]
    plain = load_model(folder, reference_ops)
    edit_tensors(change)(shutil.copytree(folder, tmp_path / "extra"))
    for (name, a), (_, b) in zip(tensors(plain), tensors(load_model(tmp_path / "extra", reference_ops))):
        assert torch.equal(a, b), name


def test_mixed_dtypes_load_in_fp32(tmp_path, reference_ops, good):
    folder = shutil.copytree(good, tmp_path / "mixed")
    edit_tensors(lambda t: t.update({Q: t[Q].bfloat16()}))(folder)
    assert load_model(folder, reference_ops).config.dtype == "float32"


def test_no_room_for_the_model_is_said(tmp_path, reference_ops, good):
    folder = shutil.copytree(good, tmp_path / "huge")
    edit_config(hidden_size=2**30, vocab_size=2**30, head_dim=16)(folder)
    with pytest.raises(CheckpointError, match="no memory on cpu for the model"):
        load_model(folder, reference_ops)


def test_unknown_dtype_is_refused(good, reference_ops):
    with pytest.raises(HeadraceError, match="dtype='int8' is not one of auto, float32, bfloat16, float16"):
        load_model(good, reference_ops, "int8")


def test_resolve(tmp_path, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append(name)
        if name != "org/model":
            raise ConnectionError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(tmp_path) == tmp_path and resolve("org/model") == tmp_path
    for wrong in ("./absent", "/absent/model", "~absent/x/y", "absent", "a/b/c", "org/"):
        with pytest.raises(CheckpointError, match="is neither a folder nor a Hugging Face id"):
            resolve(wrong)
    with pytest.raises(CheckpointError, match=r"Hugging Face hub failed \(ConnectionError\): give the path"):
        resolve("org/absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        resolve(tmp_path / "file")
    assert asked == ["org/model", "org/absent"]
