"""config.json in both of its forms, and what is refused by name."""

from __future__ import annotations

import pytest

from headrace.config import RopeScaling
from headrace.errors import CheckpointError, ConfigError
from headrace.model.families import FAMILIES, config_from_json, config_to_json

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def config(**changes):
    return config_from_json(BASE | changes, {})


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            RopeScaling("llama3", 8.0, 128),
        ),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}, RopeScaling("yarn", 4.0, 128)),
        ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 512)),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}, RopeScaling("yarn", 4.0, 128)),
        ({"rope_type": "default"}, None),
    ],
)
def test_old_and_new_forms_mean_the_same(scaling, expected):
    old = config(rope_theta=5e5, rope_scaling=scaling, torch_dtype="bfloat16")
    renamed = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    older = config(rope_theta=5e5, rope_scaling=renamed, torch_dtype="torch.bfloat16")
    new = config(rope_parameters=scaling | {"rope_theta": 5e5}, dtype="bfloat16")
    assert old == older == new
    assert (new.rope_scaling, new.rope_theta, new.dtype) == (expected, 5e5, "bfloat16")


def test_absent_fields_have_the_peers_defaults(transformers):
    absent = {key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    absent |= {"num_attention_heads": 32, "hidden_size": 1024}
    for name in FAMILIES:
        peer = getattr(transformers, name.replace("ForCausalLM", "Config"))(**absent)
        ours = config_from_json(absent | {"architectures": [name]}, {})
        assert ours.num_kv_heads == peer.num_key_value_heads
        assert ours.rms_norm_eps == peer.rms_norm_eps
        assert ours.rope_theta == peer.rope_parameters["rope_theta"]
        assert ours.tie_word_embeddings == peer.tie_word_embeddings
        assert ours.head_dim == (getattr(peer, "head_dim", None) or 32)
        assert ours.sliding_window == (getattr(peer, "sliding_window", None) or 0)


@pytest.mark.parametrize(
    ("ours", "generation", "expected"),
    [
        (None, {}, ()),
        (7, {}, (7,)),
        ([7, 9], {}, (7, 9)),
        (7, {"eos_token_id": [8, 7]}, (8, 7)),
        (7, {"eos_token_id": None}, (7,)),
        (None, {"eos_token_id": 3}, (3,)),
        ([], {}, ()),
    ],
)
def test_stop_ids(ours, generation, expected):
    assert config_from_json(BASE | {"eos_token_id": ours}, generation).eos_token_ids == expected


def test_no_stop_id_at_all_is_fine():
    assert config().eos_token_ids == () and config().bos_token_id is None


def test_windows():
    mistral = config(architectures=["MistralForCausalLM"], sliding_window=8)
    assert [mistral.window(layer) for layer in range(4)] == [8, 8, 8, 8]
    assert config(architectures=["MistralForCausalLM"], sliding_window=None).window(0) == 0
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 3}
    assert config(**qwen).window(3) == 0, "use_sliding_window is off"
    assert [config(**qwen, use_sliding_window=True).window(i) for i in range(4)] == [0, 0, 0, 8]
    assert config(sliding_window=8).window(0) == 0, "Llama has no windows"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.1,
            "beta_fast": 16.0,
            "truncate": False,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "mscale": 0.5,
            "mscale_all_dim": 0.7,
        },
    ],
)
def test_written_config_reads_back(name, scaling):
    first = config(
        architectures=[name],
        rope_scaling=scaling,
        attention_bias=True,
        mlp_bias=True,
        eos_token_id=[3, 4],
        sliding_window=16,
        use_sliding_window=True,
        max_window_layers=2,
        tie_word_embeddings=True,
    )
    assert config_from_json(config_to_json(first), {}) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures=\['MixtralForCausalLM'\] is not supported, only L"),
        ({"architectures": []}, "architectures is missing, and model_type too"),
        ({"architectures": [["LlamaForCausalLM"]]}, r"architectures\[0\]=\['LlamaForCausalLM'\] must be a string"),
        ({"architectures": None}, "architectures is missing, and model_type too"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\) is not supported"),
        ({"num_experts": 8}, "num_experts=8: experts are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic' is not supported .its table changes with the sequence's length., only li",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope scaling 'longrope' is not"),
        ({"rope_scaling": {"type": "spiral"}}, "rope scaling 'spiral' is not supported, only linear, llama3, ya"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be a number, at least 1"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor=4.0 must be less than high_freq_factor=4.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings=0 must be an integer of at least 1",
        ),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be a table"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a number"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be a number, more than 1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "96"}, "vocab_size='96' must be an integer"),
        (
            {"intermediate_size": 10**30},
            "intermediate_size=1(0{30}) must be an integer of at least 1 and at most 2147",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be an integer of at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be an integer"),
        ({"bos_token_id": 1.5}, "bos_token_id=1.5 must be an integer"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types has 1 entries for num_hidden_layers=4",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["linear"] * 4},
            r"layer_types\[0\]='linear' is not one of sliding_attention, full_attention",
        ),
    ],
)
def test_refused_by_name(changes, message):
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)
