"""Snapshots: whole or not there, checked when read; a run that goes on from one is the undisturbed run."""

import errno
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import CheckpointError, ConfigError
from headrace.model.tensorfiles import TensorFiles
from headrace.parallel.regions import Region, inside
from headrace.train.config import load_recipe
from headrace.train.run import train
from headrace.train.snapshots import disk, writer
from headrace.train.snapshots.disk import RECORD, prune, record_hash, snapshots
from headrace.train.snapshots.reader import newest_whole, open_snapshot
from headrace.train.snapshots.writer import SnapshotWriter
from headrace.train.trainer import Trainer
from parallel.region_kit import SHAPES, partitions
from serve.http_kit import until
from train.run_kit import lines_of

OVERRIDES = ("train.steps=10", "train.snapshot_every=3", "train.validate_every=4", "train.micro_batches=2")
FILE = "rank-00000-of-00001.safetensors"


@pytest.fixture
def record():
    return {"layout": {"tensor": 1}, "model": {"hidden_size": 64}, "state": {"step": 7}}


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/a": torch.randn(5, 3, generator=generator).bfloat16(),
        "first/a": torch.randn(5, 3, generator=generator),
        "model/b": torch.randn(4, generator=generator),
    }


def empty_tensors():
    return {name: torch.zeros_like(tensor) for name, tensor in some_tensors().items()}


def regions(tensors):
    return [(name, Region(tensor, (0,) * tensor.ndim, tuple(tensor.shape))) for name, tensor in tensors.items()]


def written(folder, record, tensors, keep=9):
    with SnapshotWriter(folder, keep=keep) as snapshots_:
        snapshots_.begin(record, regions(tensors))
    return folder / f"step-{record['state']['step']:08d}"


def test_what_is_written_is_read(tmp_path, record):
    path = written(tmp_path / "snapshots", record, some_tensors())
    assert {f.name for f in path.iterdir()} == {RECORD, FILE}
    snapshot, read = open_snapshot(path), empty_tensors()
    snapshot.read(regions(read))
    assert all(torch.equal(read[name], tensor) for name, tensor in some_tensors().items())
    assert snapshot.step == 7 and snapshot.record["model"] == {"hidden_size": 64}
    stored = TensorFiles.__new__(TensorFiles)  # the format's own reader reads it too
    stored._files, stored._where = {}, {}
    assert set(stored._open(path / FILE).keys()) == {"model/a[0:5,0:3]", "first/a[0:5,0:3]", "model/b[0:4]"}


def test_what_was_copied_may_change_at_once(tmp_path, record, monkeypatch):
    """The thread stands still until the live tensors are others; the next snapshot fills the same buffer."""
    gate, live = threading.Event(), some_tensors()
    write = disk.write_file
    monkeypatch.setattr(writer, "write_file", lambda *args: (gate.wait(), write(*args))[1])
    with SnapshotWriter(tmp_path, keep=9) as both:
        both.begin(record, regions(live))
        for tensor in live.values():
            tensor.zero_()
        both.poll()
        assert snapshots(tmp_path) == []
        gate.set()
        both.begin({**record, "state": {"step": 8}}, regions(some_tensors(1)))
        assert [path.name for path in snapshots(tmp_path)] == ["step-00000007"]
    for path, seed in zip(snapshots(tmp_path), (0, 1), strict=True):
        read = empty_tensors()
        open_snapshot(path).read(regions(read))
        assert all(torch.equal(read[name], tensor) for name, tensor in some_tensors(seed).items())


def test_all_is_on_the_disk_before_the_folder_has_its_name(tmp_path, record, monkeypatch):
    """A kill does not show this: a power cut would."""
    synced, named, fsync, rename = set(), {}, os.fsync, Path.rename

    def sync(descriptor):
        fsync(descriptor)
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def move(path, to):
        if str(path) in synced:  # the bytes, under whatever name
            synced.add(str(to))
        named[Path(to).name] = set(synced)
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", move)

    def tokenizer(into):
        (into / "tokenizer.json").write_text("{}")

    with SnapshotWriter(tmp_path, tokenizer=tokenizer) as one:
        one.begin(record, regions(some_tensors()))
    final, partial = tmp_path / "step-00000007", tmp_path / ".step-00000007.partial"
    files = [str(partial / file.relative_to(final)) for file in final.rglob("*")]
    assert len(files) == 4 and named[final.name] >= {str(partial), *files} and str(tmp_path) in synced


def test_a_poll_after_the_writing_makes_it_whole(tmp_path, record):
    with SnapshotWriter(tmp_path) as one:
        one.begin(record, regions(some_tensors()))
        assert one._job is not None
        one._job.thread.join()
        assert snapshots(tmp_path) == []
        one.poll()
        assert len(snapshots(tmp_path)) == 1


@pytest.mark.parametrize("file", [FILE, RECORD])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_found_and_named(tmp_path, record, file, damage):
    path = written(tmp_path, record, some_tensors()) / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    sums = ".*sha256 [0-9a-f]{64}" * (0 if file == RECORD else 1 if damage == "gone" else 2)
    with pytest.raises(CheckpointError, match=rf"{file} is (damaged|missing|not valid){sums}"):
        open_snapshot(path.parent)


def test_every_byte_of_the_record_counts(tmp_path, record):
    path = written(tmp_path, record, some_tensors())
    stored = json.loads((path / RECORD).read_text())
    assert stored["sha256"] == record_hash(stored)
    stored["tensors"]["model/a"]["regions"][0]["start"] = [0, 1]
    (path / RECORD).write_text(json.dumps(stored))
    with pytest.raises(
        CheckpointError, match=rf"{RECORD} is damaged: its sha256 is [0-9a-f]+, should be [0-9a-f]{{64}}"
    ):
        open_snapshot(path)


def test_another_version_is_refused_not_passed_over(tmp_path, record):
    path = written(tmp_path, record, some_tensors())
    (path / RECORD).write_text(json.dumps({"version": 1, **record, "files": {}}))
    with pytest.raises(ConfigError, match="is of version 1, and this headrace reads version 2: continue with"):
        newest_whole(tmp_path, pytest.fail)


def test_another_model_is_refused_with_both_values(tmp_path, record):
    snapshot = open_snapshot(written(tmp_path, record, some_tensors()))
    snapshot.require_same(record, "model", "of another model")
    with pytest.raises(ConfigError, match="of another model: hidden_size=64, this recipe has hidden_size=128"):
        snapshot.require_same({**record, "model": {"hidden_size": 128}}, "model", "of another model")


def test_tensors_that_differ_are_named(tmp_path, record):
    snapshot = open_snapshot(written(tmp_path, record, some_tensors()))
    for changed, message in (
        ({"model/c": torch.zeros(1)}, "does not hold model/c"),
        ({"model/a": torch.zeros(5, 4)}, r"model/a with shape \[5, 4\]"),
        ({"model/a": torch.zeros(5, 3)}, "model/a in bfloat16, not float32"),
    ):
        with pytest.raises(CheckpointError, match=f"{message}.*another model"):
            snapshot.read(regions({**empty_tensors(), **changed}))
    rest = {name: tensor for name, tensor in empty_tensors().items() if name != "first/a"}
    with pytest.raises(CheckpointError, match="holds first/a, which this run does not have"):
        snapshot.read(regions(rest))
    snapshot.read(regions(rest), kind="model/")


@pytest.mark.parametrize(
    ("start", "speaks", "message"),
    [
        (1, True, r"model/a is held twice: \[0:2\] and \[1:3\] overlap"),
        (2, False, "model/a has a hole: ranks hold 2 of its 4"),
        (3, True, r"model/a has shape \[4\], and a rank holds \[3:5\]"),
    ],
)
def test_regions_that_are_not_each_element_once_are_no_snapshot(tmp_path, record, start, speaks, message):
    parts = [("model/a", Region(torch.ones(2), (0,), (4,))), ("model/a", Region(torch.ones(2), (start,), (4,), speaks))]
    with pytest.raises(CheckpointError, match=message), SnapshotWriter(tmp_path) as one:
        one.begin(record, parts)
    assert list(tmp_path.iterdir()) == []


@given(st.data(), SHAPES)
def test_any_cuts_read_what_any_others_have_written(data, shape):
    """Rows, columns, rectangles: of one tensor a rank may hold several regions, views of any strides."""

    def cut(tensor, boxes):
        return [("x", Region(tensor[inside(box, [0] * len(shape))], tuple(a for a, _ in box), shape)) for box in boxes]

    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    read = torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    with tempfile.TemporaryDirectory() as folder:
        with SnapshotWriter(Path(folder)) as one:
            one.begin({"state": {"step": 1}}, cut(whole, data.draw(partitions(shape))))
        open_snapshot(Path(folder) / "step-00000001").read(cut(read, data.draw(partitions(shape))))
    assert torch.equal(read, whole)


def test_a_tensor_that_nobody_speaks_for_is_no_snapshot(tmp_path, record):
    silent = ("model/c", Region(torch.ones(2), (0,), (2,), writes=False))
    with pytest.raises(CheckpointError, match="model/c has a hole"), SnapshotWriter(tmp_path) as one:
        one.begin(record, [*regions(some_tensors()), silent])


def test_the_newest_ones_stay(tmp_path, record):
    for step in (1, 2, 30, 4):
        written(tmp_path, {**record, "state": {"step": step}}, some_tensors())
    prune(tmp_path, 2)
    assert [path.name for path in snapshots(tmp_path)] == ["step-00000004", "step-00000030"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "step-00000030"}
    written(tmp_path, {**record, "state": {"step": 31}}, some_tensors(), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000031"]


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
    recipe, out = load_recipe(recipe_file, OVERRIDES), tmp_path / "run"
    warnings: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, stop_after(7), ops=cpu_ops)
    newest = out / "snapshots" / "step-00000006"
    (newest / FILE).write_bytes(b"x")
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
    warnings: list[str] = []
    recipe = load_recipe(recipe_file, [*OVERRIDES, "train.steps=6"])
    result = train(recipe, tmp_path / "run", ops=cpu_ops)
    again = train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=warnings.append)
    assert again == result and not warnings
    train(load_recipe(recipe_file, OVERRIDES), tmp_path / "run", ops=cpu_ops, resume=True, warn=warnings.append)
    assert warnings == ["train.steps was 6 until step 6 and is 10 from here on"]
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, 11))


def test_a_snapshot_of_other_hardware_is_used_with_a_warning(recipe_file, tmp_path, cpu_ops, monkeypatch):
    recipe = load_recipe(recipe_file, OVERRIDES)
    warnings: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after(4), ops=cpu_ops)
    monkeypatch.setattr(type(cpu_ops), "fingerprint", lambda self: "elsewhere")
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=warnings.append)
    assert len(warnings) == 1 and "elsewhere" in warnings[0] and "its bits will differ" in warnings[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.intermediate_size=64", "of another model: intermediate_size=48, this recipe has intermediate_size=64"),
        ("data.seed=3", "data.seed"),
        ("train.seq_length=64", "train.seq_length"),
    ],
)
def test_another_model_or_other_data_cannot_go_on(recipe_file, tmp_path, cpu_ops, override, message):
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file, OVERRIDES), tmp_path / "run", stop_after(4), ops=cpu_ops)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        train(
            load_recipe(recipe_file, [*OVERRIDES, override]),
            tmp_path / "run",
            ops=cpu_ops,
            resume=True,
            warn=lambda _: None,
        )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_half_written_line_of_metrics_is_cut_off(recipe_file, tmp_path, cpu_ops, undisturbed):
    recipe, metrics = load_recipe(recipe_file, OVERRIDES), tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after(5), ops=cpu_ops)
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=pytest.fail)
    assert same_run(tmp_path / "run", undisturbed)


def test_training_goes_on_while_a_snapshot_is_written(recipe_file, tmp_path, cpu_ops, monkeypatch):
    """The first snapshot's file waits until two more steps are done; what it holds is its own step's state."""
    recipe = load_recipe(recipe_file, [*OVERRIDES, "train.steps=6", "train.keep_snapshots=9"])
    gate, seen, write = threading.Event(), {}, disk.write_file
    monkeypatch.setattr(writer, "write_file", lambda *args: (gate.wait(), write(*args))[1])

    def on_step(line):
        seen[line["step"]] = len(snapshots(tmp_path / "gated" / "snapshots"))
        if line["step"] == 5:
            gate.set()

    train(recipe, tmp_path / "gated", on_step, ops=cpu_ops)
    assert seen[4] == seen[5] == 0
    train(recipe, tmp_path / "free", ops=cpu_ops)
    both = [snapshots(tmp_path / name / "snapshots") for name in ("gated", "free")]
    assert [path.name for path in both[0]] == ["step-00000003", "step-00000006"]
    for ours, theirs in zip(*both, strict=True):
        assert open_snapshot(ours).record["files"] == open_snapshot(theirs).record["files"]


def test_a_snapshot_is_whole_as_soon_as_it_is_written(recipe_file, tmp_path, cpu_ops):
    """Not when the next one begins: a step after its thread has ended."""
    seen = {}

    def on_step(line):
        seen[line["step"]] = len(snapshots(tmp_path / "snapshots"))
        for thread in threading.enumerate():
            if thread.name == "snapshot":
                thread.join()

    train(load_recipe(recipe_file, [*OVERRIDES, "train.steps=6"]), tmp_path, on_step, ops=cpu_ops)
    assert (seen[4], seen[5]) == (0, 1)


def test_what_the_disk_refuses_in_the_thread_ends_the_run(recipe_file, tmp_path, cpu_ops, undisturbed, monkeypatch):
    recipe, steps, write = load_recipe(recipe_file, OVERRIDES), [], disk.write_file

    def full(path, parts):
        if "step-00000006" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, parts)

    monkeypatch.setattr(writer, "write_file", full)
    with pytest.raises(
        ConfigError,
        match=r"safetensors cannot be written: No space left on device; the last good "
        r"snapshot is .*step-00000003. Make room",
    ):
        train(recipe, tmp_path / "run", lambda line: steps.append(line["step"]), ops=cpu_ops)
    assert 6 <= steps[-1] < 10  # at a poll, or as the next one begins
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    train(recipe, tmp_path / "run", ops=cpu_ops, resume=True, warn=pytest.fail)
    assert same_run(tmp_path / "run", undisturbed)


def test_a_kill_at_any_instant_leaves_a_whole_snapshot(tmp_path):
    """A child kills itself at its first change of the disk, another at its second, and so on to the last."""
    done = subprocess.run(
        [sys.executable, "-m", "train.kill_jobs", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 20 and not any(one["ended"] for one in found[:-1]) and found[-1]["ended"]
    steps = [one["step"] for one in found]
    assert steps == sorted(steps) and set(steps) == {1, 2}  # the old one, until there is the new one
    assert all(one["right"] and one["then"] == 3 and not one["warnings"] for one in found)


def test_a_trainer_restored_is_the_trainer(recipe_file, cpu_ops):
    """State and tensors alone decide what comes next."""
    recipe = load_recipe(recipe_file, ["model.dtype=float16", "train.loss_scale_steps=3"])
    first, second = Trainer(recipe, cpu_ops), Trainer(recipe, cpu_ops)
    for _ in range(4):
        first.step()
    for (name, target), (other, source) in zip(second.tensors(), first.tensors(), strict=True):
        assert name == other
        target.tensor.copy_(source.tensor)
    second.restore(json.loads(json.dumps(first.state())))
    assert [first.step() for _ in range(2)] == [second.step() for _ in range(2)]
