"""docs/training.md tells every key of a recipe, and its default, as they are."""

import dataclasses
import re
from pathlib import Path

from headrace.train.config import SECTIONS, recipe_keys

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def default(section, key):
    """As the page writes it."""
    if (section, key) == ("model", "init"):
        return '`""`'
    [field] = [item for item in dataclasses.fields(SECTIONS[section]) if item.name == key]
    if field.default is dataclasses.MISSING:
        return "required"
    return f'`"{field.default}"`' if isinstance(field.default, str) else f"`{field.default}`"


def test_every_key_and_default_is_there_and_no_other():
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| (\S+) \|", PAGE.read_text(), re.MULTILINE)
    assert rows == [(section, key, default(section, key)) for section, keys in recipe_keys().items() for key in keys]


def test_every_metric_is_explained():
    told = set(re.findall(r"`([a-z_]+)`", PAGE.read_text()))
    assert {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
        "val_loss",
        "loss_scale",
        "skipped",
    } <= told
