"""Every key of a recipe with a value of every wrong type: one line that names the key, or a recipe that is valid."""

import json

import pytest

from headrace.cli import main
from headrace.config import RopeScaling
from headrace.errors import ConfigError, HeadraceError
from headrace.model.families import config_from_json, config_to_json
from headrace.train.config import DataConfig, load_recipe, recipe_keys

VALUES = [
    "1",
    "-1",
    "0",
    "1.5",
    "-0.5",
    "inf",
    "-inf",
    "nan",
    "99999999999999999999999999",
    "9" * 400,
    "9" * 5000,
    "1e308",
    "true",
    '"yes"',
    '""',
    "False",
    "None",
    "[]",
    "[1]",
    '["a"]',
    "[[true]]",
    "{}",
    "{x = 1}",
    '{kind = "linear", factor = 2}',
    "2020-01-01",
    "12:00:00",
    "[" * 3000,
]
KEYS = [f"{section}.{key}" for section, keys in recipe_keys().items() for key in keys]


@pytest.mark.parametrize("key", KEYS)
def test_a_value_is_valid_or_refused_in_a_line_that_names_the_key(recipe_file, key):
    section, name = key.split(".")
    before = load_recipe(recipe_file)
    for value in VALUES:
        try:
            recipe = load_recipe(recipe_file, [f"{key}={value}"])
        except HeadraceError as error:
            assert name in str(error), f"{key}={value[:40]}: {error}"
            assert "\n" not in str(error) and len(str(error)) < 600 + len(value)
        else:
            made = recipe.init if key == "model.init" else getattr(getattr(recipe, section), name)
            was = before.init if key == "model.init" else getattr(getattr(before, section), name)
            assert type(made) is type(was) or key == "model.rope_scaling", f"{key}={value[:40]}"


@pytest.mark.parametrize("section", recipe_keys())
@pytest.mark.parametrize("value", ["1", '"text"', "[1]", "true", "2020-01-01", "[{a = 1}]"])
def test_a_section_that_is_no_table_is_refused(tmp_path, recipe_text, section, value):
    file = tmp_path / "recipe.toml"
    rest = recipe_text.split("\n[")
    file.write_text(f"{section} = {value}\n" + "\n[".join(part for part in rest if not part.startswith(f"{section}]")))
    with pytest.raises(ConfigError, match=section):
        load_recipe(file)


def test_an_error_names_the_file_or_the_flag(recipe_file, recipe_text):
    recipe_file.write_text(recipe_text.replace("steps = 6", 'steps = "6"'))
    with pytest.raises(ConfigError, match=rf"^{recipe_file}: train\.steps='6' must be an integer of at least 1$"):
        load_recipe(recipe_file)
    with pytest.raises(ConfigError, match=r"^--set train\.steps='7' must be an integer"):
        load_recipe(recipe_file, ['train.steps="7"'])


@pytest.mark.parametrize("change", ["train.a\nb=1", "a\nb.c=1", "a\nb", "train.steps=5\nx=3", "train.=1", "=", ""])
def test_odd_keys_are_one_line(recipe_file, recipe_text, change):
    with pytest.raises(ConfigError, match=r"^--set ") as caught:
        load_recipe(recipe_file, [change])
    assert "\n" not in str(caught.value)
    recipe_file.write_text(recipe_text + '"a\\nb" = 1\n')
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load_recipe(recipe_file)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_passed_over(recipe_file, recipe_text):
    recipe_file.write_bytes(b"\xef\xbb\xbf" + recipe_text.encode())
    assert load_recipe(recipe_file).train.steps == 6


def test_rope_scaling_is_a_table(recipe_file):
    recipe = load_recipe(recipe_file, ['model.rope_scaling={kind="linear",factor=2}'])
    assert recipe.model.rope_scaling == RopeScaling("linear", 2.0)
    written = json.loads(json.dumps(config_to_json(recipe.model)))
    assert config_from_json(written, {}).rope_scaling == recipe.model.rope_scaling


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", r"model\.rope_scaling=1 must be a table with kind, factor"),
        ('{kind="linear"}', r"\[model\.rope_scaling\] lacks factor"),
        ('{kind="dynamic",factor=2.0}', r"model\.rope_scaling\.kind='dynamic' is not one of linear, llama3, yarn"),
        ('{kind="linear",factor="2"}', r"model\.rope_scaling\.factor='2' must be a number, at least 1"),
        ('{kind="linear",factr=2}', r"model\.rope_scaling\.factr does not exist; did you mean .*factor"),
        ('{kind="yarn",factor=2}', r"needs original_max_position_embeddings"),
        ('{kind="yarn",factor=2,original_max_position_embeddings=64,beta_fast=0}', r"beta_fast=0 must be a number"),
    ],
)
def test_what_rope_scaling_cannot_be(recipe_file, value, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file, [f"model.rope_scaling={value}"])


def test_the_home_folder_may_be_written_as_a_tilde(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "memory").mkdir()
    recipe = load_recipe(recipe_file, ["parallel.offload_folder=~/memory"])
    assert recipe.parallel.offload_folder == str(tmp_path / "memory")
    with pytest.raises(ConfigError, match=rf"data\.source='{tmp_path}/texts' is neither tinyworld nor a folder"):
        DataConfig("~/texts")


def test_a_warm_up_longer_than_the_run_is_capped(recipe_file):
    recipe = load_recipe(recipe_file, ["train.steps=1"])
    assert recipe.notes == ["optimizer.warmup_steps=2 is more than train.steps=1: the rate rises to the last step"]
    assert load_recipe(recipe_file).notes == []


def test_the_command_prints_one_line(recipe_file, tmp_path, capsys):
    for change in ("model.tie_word_embeddings=False", "model.rope_scaling=1", "train.steps=no"):
        code = main(["train", str(recipe_file), "--out", str(tmp_path / "out"), "--set", change])
        said = capsys.readouterr().err
        assert code == 2 and said.startswith(f"headrace: --set {change.split('=')[0]}=") and said.count("\n") == 1
