"""`headrace train --processes N`: a mistake is an error of one line, a crash is a restart."""

import signal
import subprocess
import sys

import psutil
import pytest

from headrace.cli.launch import launch
from serve.http_kit import until
from train.run_kit import killed_once, lines_of

RANK = "import os, signal, sys; rank = int(os.environ['RANK']); resumed = '--resume' in sys.argv;"


def as_rank(code):
    """The command of a rank that runs `code`, which knows `rank` and `resumed`."""
    return [sys.executable, "-c", RANK + code]


def train(recipe_file, out, *changes, processes=2):
    sets = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "headrace", "train", str(recipe_file), "--out", str(out)]
    return [*command, "--processes", str(processes), *sets]


def test_all_ranks_end_well(capfd):
    assert launch(as_rank("print('rank', rank, os.environ['WORLD_SIZE'], file=sys.stderr)"), 2, 3) == 0
    assert capfd.readouterr().err == "rank 0 2\n"


def test_a_mistake_of_all_ranks_is_one_line_and_not_tried_again(capfd):
    line = "print('headrace: ' + f'rank {rank}: ' * (rank > 0) + 'no', file=sys.stderr); sys.exit(2)"
    assert launch(as_rank(line), 3, 3) == 2
    [shown] = capfd.readouterr().err.splitlines()
    assert shown.endswith("no")


def test_a_mistake_of_one_rank_is_shown(capfd):
    code = "print(f'headrace: rank {rank}: no disk', file=sys.stderr) if rank else 0; sys.exit(2 * rank)"
    assert launch(as_rank(code), 2, 3) == 2
    assert capfd.readouterr().err == "headrace: rank 1: no disk\n"


def test_after_a_crash_all_ranks_resume(capfd):
    code = "sys.exit(0) if resumed else os.kill(os.getpid(), signal.SIGKILL) if rank else sys.exit(2)"
    assert launch(as_rank(code), 2, 3) == 0
    assert capfd.readouterr().err == "headrace: rank 1 was ended by signal 9: starting all again (1 of 3)\n"


@pytest.mark.parametrize("restarts", [0, 2])
def test_restarts_come_to_an_end(capfd, restarts):
    assert launch(as_rank("sys.exit(7)"), 1, restarts) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == restarts + 1 and lines[-1].endswith("rank 0 failed with exit status 7: no restart is left")


def test_the_ranks_end_with_the_launcher(tmp_path):
    code = "from pathlib import Path; Path(f'rank-{rank}').touch(); signal.pause()"
    start = f"from headrace.cli.launch import launch; launch({as_rank(code)!r}, 2, 0)"
    with subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path) as launcher:
        until(lambda: (tmp_path / "rank-0").exists() and (tmp_path / "rank-1").exists())
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        launcher.terminate()
        assert launcher.wait(60) == 128 + signal.SIGTERM
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.stepz=9"], "train.stepz does not exist; did you mean train.steps?"),
        (["train.micro_batches=3", "train.batch_size=3"], "train.micro_batches=3 is no multiple of the 2 copies"),
    ],
)
def test_a_recipe_s_mistake_is_one_line(recipe_file, tmp_path, changes, message):
    done = subprocess.run(
        train(recipe_file, tmp_path / "out", *changes), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "flags", [["--processes", "0"], ["--max-restarts", "-1"], ["--max-restarts", "2", "--processes", "1"]]
)
def test_wrong_numbers_of_processes_are_refused(recipe_file, tmp_path, flags):
    done = subprocess.run([*train(recipe_file, tmp_path / "out"), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and flags[0] in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_killed_rank_changes_no_bit_of_the_run(recipe_file, tmp_path):
    changes = ["train.steps=8", "train.snapshot_every=2", "train.sample_every=4", "parallel.tensor=2"]
    alone, out = tmp_path / "alone", tmp_path / "ranks"
    single = train(recipe_file, alone, *changes, "parallel.tensor=1", processes=1)
    subprocess.run(single, stdout=subprocess.DEVNULL, timeout=120, check=True)
    said = killed_once(train(recipe_file, out, *changes), out)
    assert "rank 1 was ended by signal 9: starting all again (1 of 3)" in said
    assert lines_of(out, timed=False) == lines_of(alone, timed=False)
    for file in (alone / "hf").iterdir():
        assert (out / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
