"""A model folder's files with values of wrong types: the error names the file and the key."""

import json
from typing import Any

import pytest

from headrace.cli import main
from headrace.config import ModelConfig
from headrace.errors import CheckpointError, HeadraceError
from headrace.llm.defaults import sampling_defaults
from headrace.llm.llm import LLM
from headrace.model.folder import read_config, resolve

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "rope_parameters": None,
    "attention_bias": False,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "layer_types": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "dtype": None,
    "hidden_act": "silu",
}
WRONG = ["text", "", True, 1.5, -1, -0.5, 10**30, float("inf"), float("nan"), [], [1], ["text"], [[1]], {}, {"x": 1}]
GENERATION = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id")


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "config.json", CONFIG)
    return tmp_path


@pytest.mark.parametrize("key", CONFIG)
def test_config_json(folder, key):
    before = read_config(folder)
    for value in WRONG:
        write(folder, "config.json", CONFIG | {key: value})
        try:
            after = read_config(folder)
        except CheckpointError as error:
            assert str(error).startswith(f"{folder / 'config.json'}: ") and "\n" not in str(error)
            assert key in str(error) or key in ("head_dim", "num_attention_heads", "num_key_value_heads"), error
        else:
            assert type(after) is type(before)
    refused = sum(_refuses(folder, key, value) for value in WRONG)
    assert refused >= 8, f"{key} takes nearly anything"


def _refuses(folder, key, value):
    write(folder, "config.json", CONFIG | {key: value})
    try:
        read_config(folder)
    except CheckpointError:
        return True
    return False


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_bias": "no"},
        {"eos_token_id": "</s>"},
        {"use_sliding_window": False, "sliding_window": "8"},
        {"use_sliding_window": False, "layer_types": ["all", "none"]},
        {"use_sliding_window": False, "max_window_layers": 1.5},
        {"num_attention_heads": 3},
        {"num_hidden_layers": 2**31 - 1},
        {"rope_scaling": {"full_attention": {"factor": 2.0}}},
    ],
    ids=lambda changes: list(changes)[-1],
)
def test_a_key_that_this_model_does_not_need_is_checked_too(folder, changes):
    write(folder, "generation_config.json", {"eos_token_id": 3})
    write(folder, "config.json", CONFIG | changes)
    with pytest.raises(CheckpointError, match=rf"^{folder / 'config.json'}: {list(changes)[-1]}"):
        read_config(folder)


@pytest.mark.parametrize("key", sorted(CONFIG.keys() - {"num_key_value_heads", "sliding_window"}))  # null is a value
def test_null_means_absent(folder, key):
    write(folder, "config.json", {name: value for name, value in CONFIG.items() if name != key})
    absent: ModelConfig | None = None
    try:
        absent = read_config(folder)
    except CheckpointError as error:
        assert "is missing" in str(error)
    write(folder, "config.json", CONFIG | {key: None})
    if absent is None:
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            read_config(folder)
    else:
        assert read_config(folder) == absent


@pytest.mark.parametrize("key", GENERATION)
def test_generation_config_json(folder, key):
    file = folder / "generation_config.json"
    refused = 0
    for value in WRONG:
        write(folder, file.name, {key: value})
        try:
            read_config(folder)
            sampling_defaults(folder)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{file}: {key}") and "\n" not in str(error)
    assert refused >= 8
    write(folder, file.name, {key: None, "max_new_tokens": "unread"})
    assert sampling_defaults(folder) == {}


@pytest.mark.parametrize("given", [{"top_p": 0}, {"temperature": "0.7"}, {"repetition_penalty": 0}, {"top_k": 1.5}])
def test_a_bad_default_is_refused_at_start(folder, given):
    write(folder, "generation_config.json", given)
    with pytest.raises(
        CheckpointError, match=rf"generation_config\.json: {next(iter(given))}=.*generation_config=none"
    ):
        LLM(folder)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        LLM(folder, generation_config="none")


CONTENTS = {
    "empty": (b"", "is not valid JSON"),
    "list": (b"[]", "must hold a JSON object"),
    "text": (b'"x"', "must hold a JSON object"),
    "binary": (b"\xff\xfe\x00", "is not valid JSON"),
    "deep": (b"[" * 200_000, "is not valid JSON"),
    "digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "folder": (None, "cannot be read"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_files_that_are_no_object(folder, name, kind):
    content, message = CONTENTS[kind]
    (folder / name).unlink(missing_ok=True)
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} {message}") as caught:
        read_config(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_byte_order_mark_is_passed_over(folder):
    before = read_config(folder)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CONFIG).encode())
    assert read_config(folder) == before


def test_without_architectures_the_model_type_decides(folder):
    before = read_config(folder)
    without = {name: value for name, value in CONFIG.items() if name != "architectures"}
    absences: list[dict[str, Any]] = [{}, {"architectures": None}, {"architectures": []}]
    for absent in absences:
        write(folder, "config.json", without | absent)
        assert read_config(folder) == before
    write(folder, "config.json", without | {"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="architectures is missing, and model_type='gpt2' is not supported"):
        read_config(folder)
    write(folder, "config.json", without | {"model_type": None})
    with pytest.raises(CheckpointError, match="architectures is missing, and model_type too"):
        read_config(folder)


def test_gguf_is_refused_with_a_way_to_convert_it(tmp_path):
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    for source in (file, tmp_path):
        with pytest.raises(CheckpointError, match=r"Q4_K_M\.gguf: GGUF is not read: .*convert the file"):
            read_config(resolve(source))


def test_the_commands_print_one_line(folder, capsys):
    for changes, key in (({"vocab_size": "96"}, "vocab_size"), ({"rms_norm_eps": "x"}, "rms_norm_eps")):
        write(folder, "config.json", CONFIG | changes)
        assert main(["serve", str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"headrace: {folder / 'config.json'}: {key}=") and said.count("\n") == 1
    write(folder, "config.json", CONFIG)
    write(folder, "generation_config.json", {"temperature": "warm"})
    assert main(["generate", str(folder), "--prompt", "x"]) == 2
    assert "generation_config.json: temperature='warm' must be a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": "16"}, "block_size='16' must be an integer"),
        ({"prefix_caching": "no"}, "prefix_caching='no' must be true or false"),
        ({"threads": 1.0}, "threads=1.0 must be an integer"),
        ({"slo_tbt": "5"}, "slo_tbt='5' must be a number"),
        ({"num_kv_blocks": -1}, "num_kv_blocks=-1 must not be negative"),
        ({"max_num_seqs": None}, "max_num_seqs=None must be an integer"),
        ({"max_num_batched_tokens": 1.5}, "max_num_batched_tokens=1.5 must be an integer or a string"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory='lots' is not an amount of memory"),
        ({"kv_cache_memory": "9" * 400}, "is not an amount of memory"),
        ({"kv_cache_memory": 1.5}, "kv_cache_memory=1.5 is not an amount of memory"),
        ({"device": 1}, "device=1 must be a string"),
        ({"dtype": ["float32"]}, r"dtype=\['float32'\] must be a string"),
    ],
)
def test_options_of_the_wrong_type(folder, options, message):
    with pytest.raises(HeadraceError, match=message):
        LLM(folder, **options)
