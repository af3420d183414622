"""`torchrun … -m headrace train`: the run of one process, to the bit, and after a rank is killed too."""

import json
import subprocess
import sys

import pytest
import torch

from headrace.cli import main
from headrace.errors import ConfigError
from headrace.parallel.group import RankGroup
from headrace.parallel.mesh import Mesh
from headrace.train.config import load_recipe
from headrace.train.run import train
from headrace.train.trainer import Trainer
from serve.http_kit import served
from train.run_kit import killed_once, lines_of

CHANGES = [
    "train.steps=8",
    "train.batch_size=4",
    "train.micro_batches=2",
    "train.snapshot_every=2",
    "train.validate_every=4",
    "train.sample_every=4",
]


def torchrun(processes, recipe_file, out, *changes, restarts=0):
    """The command as users write it, on a port of its own."""
    sets = [part for change in changes for part in ("--set", change)]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        str(restarts),
        "-m",
        "headrace",
        "train",
        str(recipe_file),
        "--out",
        str(out),
        *sets,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recipe_text, cpu_ops):
    """The run of one process, which no test changes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "recipe.toml").write_text(recipe_text)
    train(load_recipe(folder / "recipe.toml", CHANGES), folder / "alone", ops=cpu_ops)
    return folder / "alone"


def same_run(out, undisturbed):
    assert lines_of(out, timed=False) == lines_of(undisturbed, timed=False)
    for file in (undisturbed / "hf").iterdir():
        assert (out / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("processes", "tensor"), [(2, 2), (4, 2)])
def test_ranks_leave_what_one_process_leaves(recipe_file, tmp_path, undisturbed, processes, tensor):
    out = tmp_path / "ranks"
    done = subprocess.run(
        torchrun(processes, recipe_file, out, *CHANGES, f"parallel.tensor={tensor}"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    same_run(out, undisturbed)
    assert done.stdout.count("held out") == 3 and done.stdout.count("step    4 │ ") == 2
    assert {file.name for file in (out / "snapshots" / "step-00000008").iterdir()} == {
        "snapshot.json",
        "tokenizer",
        *(f"rank-{i:05d}-of-{processes:05d}.safetensors" for i in range(tensor)),
    }


def test_a_killed_rank_is_started_again_and_the_run_is_the_same(recipe_file, tmp_path, undisturbed):
    out = tmp_path / "ranks"
    command = torchrun(2, recipe_file, out, *CHANGES, "parallel.tensor=2", restarts=2)
    said = killed_once(command, out)
    assert "rank 1 has gone" in said or "Signal 9" in said
    same_run(out, undisturbed)


def test_a_layout_that_cannot_be_is_refused_by_every_rank(recipe_file, tmp_path):
    changes = ["train.micro_batches=3", "train.batch_size=3"]
    done = subprocess.run(
        torchrun(2, recipe_file, tmp_path / "out", *changes), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "train.micro_batches=3 is no multiple of the 2 copies" in done.stderr
    assert "headrace: rank 1:" in done.stderr and 'File "/' not in done.stderr.split("headrace:")[1].splitlines()[0]


def test_a_recipe_s_mistake_is_printed_once(recipe_file, tmp_path):
    command = torchrun(2, recipe_file, tmp_path / "out", "train.steps=-1", restarts=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("--set train.steps=-1 must be") == 1


def test_another_rank_waits_for_the_first_to_print_a_mistake(recipe_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited: list[str] = []
    monkeypatch.setattr("headrace.cli.train.time.sleep", lambda seconds: waited.append(capsys.readouterr().err))
    assert main(["train", str(recipe_file), "--out", str(tmp_path / "out"), "--set", "train.steps=-1"]) == 2
    assert waited == [""] and "train.steps=-1 must be" in capsys.readouterr().err


def test_what_two_processes_cannot_be_is_refused_before_they_meet(recipe_file, cpu_ops):
    with pytest.raises(ConfigError, match=r"2 processes are no multiple of parallel\.tensor=4"):
        Mesh.meet(None, 0, 2, 4, torch.device("cpu"))
    recipe = load_recipe(recipe_file, ["parallel.tensor=2", "model.num_heads=3", "model.num_kv_heads=1"])
    with pytest.raises(ConfigError, match="does not divide the model's 1 virtual"):
        Trainer(recipe, cpu_ops, Mesh(RankGroup.of_size(2)))


@pytest.mark.parametrize(("processes", "tensor"), [(2, 2), (2, 1)])
def test_a_run_goes_on_in_another_layout(recipe_file, tmp_path, undisturbed, cpu_ops, processes, tensor):
    """Begun by one process, stopped, ended by two: the bits are those of one, and a line says what has changed."""

    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    out = tmp_path / "moved"
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file, CHANGES), out, stop, ops=cpu_ops)
    command = [*torchrun(processes, recipe_file, out, *CHANGES, f"parallel.tensor={tensor}"), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [warning] = [line for line in done.stdout.splitlines() if "warning" in line]
    assert "step-00000004 was written by tensor 1, " in warning and f"this is tensor {tensor}, " in warning
    same_run(out, undisturbed)


def test_the_trainer_s_log_probabilities_are_the_server_s(recipe_file, undisturbed, cpu_ops):
    """Packed in one batch in the trainer; alone, over HTTP, on one rank and on two, in the server."""
    folder = undisturbed / "hf"
    trainer = Trainer(load_recipe(recipe_file, [f"model.init={folder}", *CHANGES]), cpu_ops)
    [batch] = trainer.source.validation(96, 8, 6)
    with torch.no_grad():
        packed = trainer.log_probabilities(batch)
    assert len(batch.lengths) == 6
    for ranks in ("1", "2"):
        with served(folder, "--tensor-parallel-size", ranks, "--max-num-batched-tokens", "20") as server:
            start, got = 0, []
            for length in batch.lengths:
                counting = batch.rows_R[(batch.rows_R >= start) & (batch.rows_R < start + length)]
                last = batch.targets_R[batch.rows_R == counting[-1]].item()
                ids = [*batch.ids_T[start : start + length].tolist(), last]
                asked = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
                tables = server.post("/v1/completions", **asked).json()["choices"][0]["prompt_logprobs"]
                got += [tables[row - start + 1][str(ids[row - start + 1])]["logprob"] for row in counting.tolist()]
                start += length
        assert json.loads(json.dumps(packed.tolist())) == got
