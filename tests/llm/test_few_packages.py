"""`LLM` and the trainer work where the packages of the server and of plots are not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.extras import EXTRAS

SOURCE = Path(__file__).resolve().parents[2] / "src" / "headrace"
ROOMS = ("text", "kernels", "parallel", "attention", "model", "zero", "train", "cache", "engine", "llm")
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules} | {"starlette", "rich"})
BLOCK = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
GENERATE = """
from headrace import LLM, SamplingParams
params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
out = LLM(sys.argv[1], threads=1).generate("Once upon a time", params)
print(len(out[0].outputs[0].token_ids), "tokens")
"""
TRAIN = """
from headrace.train.config import load_recipe
from headrace.train.trainer import Trainer
trainer = Trainer(load_recipe("demo", ["train.batch_size=1", "train.seq_length=32", "model.num_layers=1"]))
trainer.step()
print(trainer.steps, "step")
"""


def modules():
    for room in ROOMS:
        for path in sorted((SOURCE / room).rglob("*.py")):
            if "cuda" not in path.parts:
                yield ".".join(("headrace", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


IMPORT = f"import importlib\nfor name in {list(modules())}: importlib.import_module(name)\nprint('all')"


@pytest.mark.parametrize(
    ("script", "says"), [(IMPORT, "all"), (GENERATE, "3 tokens"), (TRAIN, "1 step")], ids=["import", "LLM", "Trainer"]
)
def test_it_runs_without_the_optional_packages(tinyworld_checkpoint, script, says):
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + script, str(tinyworld_checkpoint)], capture_output=True, text=True
    )
    assert done.stdout.strip() == says, done.stderr


def test_the_packages_are_absent():
    done = subprocess.run([sys.executable, "-c", BLOCK + "import fastapi"], capture_output=True, text=True)
    assert "No module named 'fastapi'" in done.stderr
