"""Snapshots: whole or not there, checked when read; a run that goes on from one is the undisturbed run."""

import json
import subprocess
import sys

import pytest
import torch

from headrace.errors import CheckpointError, ConfigError
from headrace.model.tensorfiles import TensorFiles
from headrace.train.config import load_recipe
from headrace.train.run import train
from headrace.train.snapshot import newest_whole, open_snapshot, prune, snapshots, write_snapshot
from headrace.train.trainer import Trainer
from serve.http_kit import until
from train.run_kit import lines_of

OVERRIDES = ("train.steps=10", "train.snapshot_every=3", "train.validate_every=4", "train.micro_batches=2")


@pytest.fixture
def record():
    return {"layout": {"tensor": 1}, "model": {"hidden_size": 64}, "state": {"step": 7}}


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"model/a": torch.randn(5, 3, generator=generator), "first/a": torch.randn(15, generator=generator),
            "model/b": torch.randn(4, generator=generator).bfloat16()}


def empty_tensors():
    return {name: torch.zeros_like(tensor) for name, tensor in some_tensors().items()}


def test_what_is_written_is_read(tmp_path, record):
    path = write_snapshot(tmp_path / "snapshots", record, some_tensors().items())
    assert path.name == "step-00000007" and {f.name for f in path.iterdir()} == {
        "snapshot.json", "rank-00000-of-00001.safetensors"}
    snapshot, read = open_snapshot(path), empty_tensors()
    snapshot.read(read.items())
    assert all(torch.equal(read[name], tensor) for name, tensor in some_tensors().items())
    assert snapshot.step == 7 and snapshot.record["model"] == {"hidden_size": 64}


def test_every_rank_has_a_file_and_the_first_seals_them(tmp_path, record):
    """Ranks in turn: the others' parts of the barriers are played by the first's."""
    others = iter([lambda: None, lambda: write_other(), lambda: None])

    def write_other():
        partial = tmp_path / ".step-00000007.partial"
        write_snapshot_file(partial / "rank-00001-of-00002.safetensors")

    def write_snapshot_file(file):
        import safetensors.torch

        safetensors.torch.save_file(some_tensors(1), file)

    path = write_snapshot(tmp_path, record, some_tensors(0).items(), rank=0, ranks=2, barrier=lambda: next(others)())
    for rank in range(2):
        read = empty_tensors()
        open_snapshot(path).read(read.items(), rank)
        assert all(torch.equal(read[name], tensor) for name, tensor in some_tensors(rank).items())


@pytest.mark.parametrize("file", ["rank-00000-of-00001.safetensors", "snapshot.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_found_and_named(tmp_path, record, file, damage):
    path = write_snapshot(tmp_path, record, some_tensors().items()) / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    if (file, damage) == ("snapshot.json", "changed"):  # a digit of a hash: the file it speaks of is at fault
        file = "rank-00000"
    with pytest.raises(CheckpointError, match=file):
        open_snapshot(path.parent)


def test_another_layout_or_model_is_refused_with_both_values(tmp_path, record):
    snapshot = open_snapshot(write_snapshot(tmp_path, record, some_tensors().items()))
    sections = {"layout": "of another layout", "model": "of another model"}
    snapshot.require_same(record, sections)
    with pytest.raises(ConfigError, match="of another layout: tensor=1, this run has tensor=2"):
        snapshot.require_same({**record, "layout": {"tensor": 2}}, sections)
    with pytest.raises(ConfigError, match="of another model: hidden_size=64, this run has hidden_size=128"):
        snapshot.require_same({**record, "model": {"hidden_size": 128}}, sections)


def test_tensors_that_differ_are_named(tmp_path, record):
    snapshot = open_snapshot(write_snapshot(tmp_path, record, some_tensors().items()))
    for changed, message in (({"model/c": torch.zeros(1)}, "does not hold model/c"),
                             ({"model/a": torch.zeros(5, 4)}, r"model/a with shape \[5, 4\]")):
        with pytest.raises(CheckpointError, match=message):
            snapshot.read({**empty_tensors(), **changed}.items())
    with pytest.raises(CheckpointError, match="holds first/a, which this run does not have"):
        snapshot.read({name: tensor for name, tensor in empty_tensors().items() if name != "first/a"}.items())


def test_the_newest_ones_stay(tmp_path, record):
    for step in (1, 2, 30, 4):
        write_snapshot(tmp_path, {**record, "state": {"step": step}}, some_tensors().items())
    prune(tmp_path, 2)
    assert [path.name for path in snapshots(tmp_path)] == ["step-00000004", "step-00000030"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "step-00000030"}


def test_a_write_that_fails_leaves_what_was_there(tmp_path, record, monkeypatch):
    path = write_snapshot(tmp_path, record, some_tensors(0).items())

    def killed(folder, to):
        raise KeyboardInterrupt

    monkeypatch.setattr("headrace.train.snapshot._take_name", killed)
    with pytest.raises(KeyboardInterrupt):
        write_snapshot(tmp_path, record, some_tensors(1).items())
    assert snapshots(tmp_path) == [path]
    read = empty_tensors()
    newest_whole(tmp_path, pytest.fail).read(read.items())
    assert torch.equal(read["model/a"], some_tensors(0)["model/a"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recipe_text, cpu_ops):
    """The folder of a run from its beginning to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "recipe.toml").write_text(recipe_text)
    train(load_recipe(folder / "recipe.toml", OVERRIDES), folder / "run", ops=cpu_ops)
    return folder / "run"


def weights(out):
    files = TensorFiles(out / "hf")
    return {name: files.tensor(name) for name in files.names()}


def same_run(a, b):
    """Metrics but for times, weights, and all that the last snapshot holds, to the bit."""
    assert lines_of(a, timed=False) == lines_of(b, timed=False)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    last = [open_snapshot(snapshots(out / "snapshots")[-1]) for out in (a, b)]
    assert last[0].record["files"] == last[1].record["files"] and last[0].record["state"] == last[1].record["state"]
    return True


def stop_after(step):
    def on_step(line):
        if line["step"] == step:
            raise KeyboardInterrupt
    return on_step


@pytest.mark.parametrize("stop", [2, 3, 5, 8])
def test_a_resumed_run_is_the_undisturbed_one(recipe_file, tmp_path, cpu_ops, undisturbed, stop):
    recipe = load_recipe(recipe_file, OVERRIDES)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after(stop), ops=cpu_ops)
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=pytest.fail)
    assert same_run(tmp_path / "run", undisturbed)


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(recipe_file, tmp_path, cpu_ops):
    overrides = ["train.steps=120", "train.snapshot_every=10"]
    out, flags = tmp_path / "run", [word for o in overrides for word in ("--set", o)]
    command = [sys.executable, "-m", "headrace", "train", str(recipe_file), "--out", str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b"\n") >= 13))
    process.kill()
    assert process.wait() == -9
    killed_at = metrics.read_bytes().count(b"\n")
    assert 13 <= killed_at < 120
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    train(load_recipe(recipe_file, overrides), tmp_path / "undisturbed", ops=cpu_ops)
    assert same_run(out, tmp_path / "undisturbed")


def test_a_damaged_snapshot_gives_way_to_the_one_before_it(recipe_file, tmp_path, cpu_ops, undisturbed):
    recipe, out, warnings = load_recipe(recipe_file, OVERRIDES), tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, stop_after(7), ops=cpu_ops)
    newest = out / "snapshots" / "step-00000006"
    (newest / "rank-00000-of-00001.safetensors").write_bytes(b"x")
    train(recipe, out, ops=cpu_ops, resume=True, warn=warnings.append)
    [warning] = warnings
    assert "step-00000006" in warning and "damaged" in warning and "going back" in warning
    assert same_run(out, undisturbed) and newest.with_name("step-00000006.damaged").is_dir()


def test_without_a_whole_snapshot_a_run_begins_again(recipe_file, tmp_path, cpu_ops, undisturbed):
    recipe = load_recipe(recipe_file, OVERRIDES)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after(2), ops=cpu_ops)
    assert not (tmp_path / "run" / "snapshots").exists()
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=pytest.fail)
    assert same_run(tmp_path / "run", undisturbed)


def test_a_restart_by_torchrun_goes_on_with_its_own_run_only(recipe_file, tmp_path, cpu_ops, undisturbed, monkeypatch):
    recipe, out = load_recipe(recipe_file, OVERRIDES), tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, stop_after(5), ops=cpu_ops)
    with pytest.raises(ConfigError, match="--resume"):
        train(recipe, out, ops=cpu_ops)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    with pytest.raises(ConfigError, match="--resume"):
        train(recipe, out, ops=cpu_ops)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    train(recipe, out, ops=cpu_ops, warn=pytest.fail)
    assert same_run(out, undisturbed)


def test_a_run_that_is_over_may_be_asked_for_more(recipe_file, tmp_path, cpu_ops, undisturbed):
    warnings = []
    recipe = load_recipe(recipe_file, [*OVERRIDES, "train.steps=6"])
    result = train(recipe, tmp_path / "run", ops=cpu_ops)
    again = train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=warnings.append)
    assert again == result and not warnings
    train(load_recipe(recipe_file, OVERRIDES), tmp_path / "run", ops=cpu_ops, resume=True, warn=warnings.append)
    assert warnings == ["train.steps was 6 until step 6 and is 10 from here on"]
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, 11))


def test_a_snapshot_of_other_hardware_is_used_with_a_warning(recipe_file, tmp_path, cpu_ops, monkeypatch):
    recipe, warnings = load_recipe(recipe_file, OVERRIDES), []
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after(4), ops=cpu_ops)
    monkeypatch.setattr(type(cpu_ops), "fingerprint", lambda self: "elsewhere")
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=warnings.append)
    assert len(warnings) == 1 and "elsewhere" in warnings[0] and "not with the bits" in warnings[0]


@pytest.mark.parametrize(("override", "message"), [
    ("model.intermediate_size=64", "of another model: intermediate_size=48, this run has intermediate_size=64"),
    ("data.seed=3", "data.seed"), ("train.seq_length=64", "train.seq_length")])
def test_another_model_or_other_data_cannot_go_on(recipe_file, tmp_path, cpu_ops, override, message):
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file, OVERRIDES), tmp_path / "run", stop_after(4), ops=cpu_ops)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        train(load_recipe(recipe_file, [*OVERRIDES, override]), tmp_path / "run", ops=cpu_ops, resume=True,
              warn=lambda _: None)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_half_written_line_of_metrics_is_cut_off(recipe_file, tmp_path, cpu_ops, undisturbed):
    recipe, metrics = load_recipe(recipe_file, OVERRIDES), tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after(5), ops=cpu_ops)
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=pytest.fail)
    assert same_run(tmp_path / "run", undisturbed)


def test_a_trainer_restored_is_the_trainer(recipe_file, cpu_ops):
    """State and tensors alone decide what comes next."""
    recipe = load_recipe(recipe_file, ["model.dtype=float16", "train.loss_scale_steps=3"])
    first, second = Trainer(recipe, cpu_ops), Trainer(recipe, cpu_ops)
    for _ in range(4):
        first.step()
    for (name, target), (other, source) in zip(second.tensors(), first.tensors(), strict=True):
        assert name == other
        target.copy_(source)
    second.restore(json.loads(json.dumps(first.state())))
    assert [first.step() for _ in range(2)] == [second.step() for _ in range(2)]
