"""`headrace plan`, as a shell would run it."""

from pathlib import Path

import pytest

from headrace.cli import main
from headrace.train.plan import STATES

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run(capsys, *argv):
    code = main(["plan", *map(str, argv)])
    return code, *capsys.readouterr()


def test_a_recipe_on_this_machine(capsys):
    code, out, _ = run(capsys, RECIPES / "demo.toml")
    assert code == 0 and "fits into" in out and "this machine's" in out
    assert "smallest degree that fits with train.recompute = 'none': parallel.tensor = 1" in out
    assert "8                         no: tensor parallelism of 8 does not divide the model's 4 virtual shards" in out


def test_devices_and_memory(capsys):
    code, out, _ = run(capsys, RECIPES / "7b.toml", "--memory", "24GiB", "--devices", 16)
    assert code == 0 and "(--memory)" in out
    table = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "✓" in table["8 × 2"] and "✓" not in table["1 × 16"]
    assert "smallest degree that fits with train.recompute = 'selective': parallel.tensor = 8" in out
    code, out, _ = run(
        capsys, RECIPES / "7b.toml", "--devices", 64, "--set", "parallel.zero=3", "--set", "train.batch_size=64"
    )
    states = next(line for line in out.split("ZeRO's stages")[1].splitlines() if line.startswith("all"))
    assert code == 0 and "zero 3, 8 tensor-parallel" in out
    assert states.split()[1::2] == ["12.57", "4.32", "2.95", "1.57"]
    code, out, _ = run(capsys, RECIPES / "7b.toml", "--memory", "1GiB")
    assert code == 0 and "does not fit into 1.00 GiB" in out and "'selective': none" in out
    assert out.splitlines()[-1].endswith("parallel.tensor = 8: none")


def test_what_a_run_has_held_stands_beside_the_plan(capsys, tinyworld_checkpoint):
    sizes = ["model.hidden_size=64", "model.intermediate_size=172", "model.num_layers=2", "model.head_dim=16"]
    changes = [word for size in sizes for word in ("--set", size)]
    code, out, _ = run(capsys, RECIPES / "demo.toml", *changes, "--measured", tinyworld_checkpoint.parent)
    held = out.split("held by the first rank of ")[1].splitlines()
    assert code == 0 and "zero 0, 1 tensor-parallel × 1 copy" in held[0]
    assert [line[:24].strip() for line in held[2:7]] == [*STATES, "all"]
    assert all(line.split()[-4:-2] == line.split()[-2:] for line in held[2:7] if "fp32 masters" not in line)
    assert held[7].startswith("process")
    code, out, error = run(capsys, RECIPES / "7b.toml", "--measured", tinyworld_checkpoint.parent)
    assert code == 2 and out == "" and "of another model: architecture='Qwen3ForCausalLM'" in error
    code, out, error = run(capsys, RECIPES / "demo.toml", "--measured", tinyworld_checkpoint)
    assert code == 2 and out == "" and "holds no whole snapshot" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "parallel.tensor=16"], "does not divide the model's 8 virtual shards"),
        (["--devices", "4"], "--devices 4 are fewer than parallel.tensor=8"),
        (["--memory", "much"], "amount of memory"),
        (["--devices", "24"], "3 copies of the model are not a power of two"),
        (["--memory", "0"], "more than 0"),
        (["--set", "model.hiden_size=3"], "did you mean model.hidden_size"),
    ],
)
def test_what_cannot_be_is_one_clear_line(capsys, flags, message):
    code, out, error = run(capsys, RECIPES / "7b.toml", *flags)
    assert code == 2 and out == "" and message in error and error.count("\n") == 1
