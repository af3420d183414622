"""Model families: conversion of each family's `config.json` to a `ModelConfig` and back.

The forms of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`) are read;
the first is written, as both versions read it. An absent field gets transformers' default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from headrace.config import DTYPES, MOST_LAYERS, ModelConfig, RopeScaling
from headrace.errors import CheckpointError, ConfigError
from headrace.typed import Bounds, Natural, OneOf, read_value

__all__ = ["FAMILIES", "Family", "config_from_json", "config_to_json", "require_writable", "stop_ids"]

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """The properties of a family that its config.json does not state.

    `attention_bias` "config" follows config.json for q, k, v and o; "qkv" is a bias on q, k and v, always.
    `window`: which layers use a sliding window: "never", "all" (if `sliding_window` is set) or "listed" (`layer_types`,
    or from `max_window_layers` up, if `use_sliding_window`). `defaults` are for fields that are absent.
    """

    model_type: str
    attention_bias: str = "none"
    mlp_bias: bool = False
    qk_norm: bool = False
    window: str = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)


QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias="config", mlp_bias=True),
    "MistralForCausalLM": Family("mistral", window="all", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "Qwen2ForCausalLM": Family("qwen2", attention_bias="qkv", window="listed", defaults=QWEN),
    "Qwen3ForCausalLM": Family(
        "qwen3", attention_bias="config", qk_norm=True, window="listed", defaults={**QWEN, "head_dim": 128}
    ),
}

NULL_IS_A_VALUE = ("num_key_value_heads", "sliding_window")
"""Fields in which null is not the default: as many as heads, no window."""
LAYERS = ("sliding_attention", "full_attention")
FIXED_TABLES = ("linear", "llama3", "yarn")
LENGTH_DEPENDENT = ("dynamic", "longrope", "su", "ntk")


def config_from_json(json: Json, generation: Json) -> ModelConfig:
    """The model that a config.json describes, with the stop ids of generation_config.json where it has them.

    Raises `CheckpointError` naming the field that is missing, malformed or not supported.
    """
    name = _architecture(json)
    family = FAMILIES[name]
    given = {key: value for key, value in json.items() if value is not None or key in NULL_IS_A_VALUE}
    json = {**family.defaults, **given}
    _refuse_unsupported(json)
    heads = _integer(json, "num_attention_heads")
    hidden = _integer(json, "hidden_size")
    layers = int(_required(json, "num_hidden_layers", Annotated[int, Bounds(1, MOST_LAYERS)], None))
    head_dim = _integer(json, "head_dim", hidden // max(heads, 1))
    positions = _integer(json, "max_position_embeddings")
    kv_heads = _integer(json, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    bias = _flag(json, "attention_bias") and family.attention_bias == "config"
    theta, scaling = _rope(json, positions)
    window, sliding = _window(json, family, layers)
    own_ids = stop_ids(json)
    return ModelConfig(
        architecture=name,
        vocab_size=_integer(json, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(json, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=_number(json, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(json, "tie_word_embeddings"),
        qkv_bias=bias or family.attention_bias == "qkv",
        o_bias=bias,
        mlp_bias=_flag(json, "mlp_bias") and family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=sliding,
        bos_token_id=_value(json, "bos_token_id", Natural | None),
        eos_token_ids=own_ids if generation.get("eos_token_id") is None else stop_ids(generation),
        dtype=_dtype(json),
    )


def stop_ids(json: Json) -> tuple[int, ...]:
    """The `eos_token_id` of a config.json or generation_config.json: one id, a list of them or null."""
    value = json.get("eos_token_id")
    if isinstance(value, list):
        ids: tuple[int, ...] = _value(json, "eos_token_id", tuple[Natural, ...])
        return ids
    return () if value is None else (_value(json, "eos_token_id", Natural),)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config`, for transformers 4 and 5 and for `config_from_json`."""
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise CheckpointError(f"architecture {config.architecture!r} is not one of {', '.join(FAMILIES)}")
    eos = list(config.eos_token_ids)
    json: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _scaling_to_json(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "torch_dtype": config.dtype,
    }
    if family.attention_bias == "config":
        json["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        json["mlp_bias"] = config.mlp_bias
    if family.window == "all":
        json["sliding_window"] = config.sliding_window or None
    elif family.window == "listed":
        sliding = [config.window(layer) > 0 for layer in range(config.num_layers)]
        json["use_sliding_window"] = any(sliding)
        json["sliding_window"] = config.sliding_window or None
        json["max_window_layers"] = config.num_layers - sum(sliding)
        json["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return json


def require_writable(config: ModelConfig) -> None:
    """Raise `ConfigError` for a model that no config.json of its architecture describes: it could not be loaded."""
    read = config_from_json(config_to_json(config), {})
    read = dataclasses.replace(read, virtual_shards=config.virtual_shards, dropout=config.dropout)
    layers = range(config.num_layers)
    if [config.window(layer) for layer in layers] == [read.window(layer) for layer in layers]:
        read = dataclasses.replace(read, sliding_window=config.sliding_window, sliding_layers=config.sliding_layers)
    for key in (item.name for item in dataclasses.fields(config)):
        ours, theirs = getattr(config, key), getattr(read, key)
        if ours != theirs:
            raise ConfigError(
                f"model.{key}={ours!r} cannot be written: a config.json of {config.architecture} with the other "
                f"values means {theirs!r}"
            )


def _scaling_to_json(scaling: RopeScaling) -> dict[str, Any]:
    json: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return json
    json["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        return json | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    json |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    optional = {
        "attention_factor": scaling.attention_factor,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }
    return json | {key: value for key, value in optional.items() if value}


def _refuse_unsupported(json: Json) -> None:
    if json.get("quantization_config"):
        method = json["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise CheckpointError(f"quantization_config ({method}) is not supported: give the plain checkpoint")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if json.get(key):
            raise CheckpointError(f"{key}={json[key]}: experts are not supported, only dense models")
    act = _value(json, "hidden_act", str, "silu")
    if act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act={act!r} is not supported: it must be 'silu'")


def _architecture(json: Json) -> str:
    """A name in `FAMILIES`, by `architectures`; by `model_type` where that is absent."""
    names = _value(json, "architectures", tuple[str, ...], ())
    kind = _value(json, "model_type", str, "")
    name = names[0] if names else next((name for name, family in FAMILIES.items() if family.model_type == kind), "")
    if name in FAMILIES:
        return str(name)
    known = f"only {', '.join(FAMILIES)}"
    if names:
        raise CheckpointError(f"architectures={list(names)!r} is not supported, {known}")
    raise CheckpointError(
        f"architectures is missing, and model_type={kind!r} is not supported, {known}"
        if kind
        else f"architectures is missing, and model_type too: the model cannot be recognised; supported are {known[5:]}"
    )


def _rope(json: Json, positions: int) -> tuple[float, RopeScaling | None]:
    anything = Mapping[str, Any]
    key = "rope_scaling" if _value(json, "rope_scaling", anything, {}) else "rope_parameters"
    rope = _value(json, key, anything, {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{key} that differ by layer type are not supported")
    theta = _number(rope, "rope_theta", _number(json, "rope_theta", 10000.0))
    kind = _value(rope, "rope_type", str, _value(rope, "type", str, "default"))
    for source in (json, rope):
        if source.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise CheckpointError(f"partial_rotary_factor={source['partial_rotary_factor']} is not supported")
    if kind == "default":
        return theta, None
    if kind not in FIXED_TABLES:
        why = " (its table changes with the sequence's length)" if kind in LENGTH_DEPENDENT else ""
        raise CheckpointError(f"rope scaling {kind!r} is not supported{why}, only {', '.join(FIXED_TABLES)}")
    return theta, _scaling(json, rope, kind, positions)


def _scaling(json: Json, rope: Json, kind: str, positions: int) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind, _number(rope, "factor"))
    trained = _integer(
        rope, "original_max_position_embeddings", _integer(json, "original_max_position_embeddings", positions)
    )
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        return RopeScaling(kind, _number(rope, "factor"), trained, low_freq_factor=low, high_freq_factor=high)
    return RopeScaling(
        kind,
        _number(rope, "factor", positions / trained),
        trained,
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
        attention_factor=None if rope.get("attention_factor") is None else _number(rope, "attention_factor"),
        mscale=_number(rope, "mscale", 0.0),
        mscale_all_dim=_number(rope, "mscale_all_dim", 0.0),
        truncate=_flag(rope, "truncate", True),
    )


def _window(json: Json, family: Family, layers: int) -> tuple[int, tuple[bool, ...]]:
    # All are read, also where none is used, so that a wrong type is found whatever the family.
    listed, window = _flag(json, "use_sliding_window"), _value(json, "sliding_window", Natural, 0)
    kinds = _value(json, "layer_types", tuple[Annotated[str, OneOf(LAYERS)], ...], ())
    full = _value(json, "max_window_layers", Natural, 0)
    if family.window == "never" or (family.window == "listed" and not listed):
        return 0, ()
    if not window or family.window == "all":
        return window, ()
    if not kinds:
        return window, tuple(layer >= full for layer in range(layers))
    if len(kinds) != layers:
        raise CheckpointError(f"layer_types has {len(kinds)} entries for num_hidden_layers={layers}")
    return window, tuple(kind == "sliding_attention" for kind in kinds)


def _dtype(json: Json) -> str:
    key = "torch_dtype" if json.get("dtype") is None else "dtype"
    dtype = str(_value(json, key, str, "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{key}={dtype!r} is not supported: it must be one of {', '.join(DTYPES)}")
    return dtype


def _value(json: Json, key: str, hint: Any, default: Any = None) -> Any:
    """A value of the annotated type; `default` where it is absent or null."""
    if json.get(key) is None:
        return default
    try:
        return read_value(hint, json[key], key, loose=True)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _integer(json: Json, key: str, default: int | None = None) -> int:
    return int(_required(json, key, Annotated[int, Bounds(1, 2**31 - 1)], default))


def _number(json: Json, key: str, default: float | None = None) -> float:
    return float(_required(json, key, float, default))


def _flag(json: Json, key: str, default: bool = False) -> bool:
    return bool(_value(json, key, bool, default))


def _required(json: Json, key: str, hint: Any, default: Any) -> Any:
    value = _value(json, key, hint, default)
    if value is None:
        raise CheckpointError(f"{key} is missing")
    return value
