"""Snapshots that some ranks write and others read, in real processes: every tensor by ==, and the steps that follow."""

import errno
import itertools
from pathlib import Path

import pytest
import torch

from headrace.kernels.load import load_ops
from headrace.parallel.regions import Region, inside
from headrace.train.config import load_recipe
from headrace.train.snapshots.disk import RECORD, snapshots
from headrace.train.snapshots.reader import open_snapshot
from headrace.train.trainer import Trainer
from parallel.model_jobs import digest
from parallel.rank_kit import run_mesh

LAYOUTS = list(itertools.product((1, 2), (1, 2)))
"""(tensor, copies)"""
KINDS = {
    "fp32": ["model.tie_word_embeddings=false"],
    "bf16": ["model.dtype=bfloat16", "model.num_kv_heads=1", "model.qkv_bias=true"],
}
"""The second has a kv head that both ranks hold."""
MORE = ["train.batch_size=4", "train.micro_batches=2"]


def on(layout, function, *arguments):
    tensor, copies = layout
    return run_mesh(f"train.snapshot_jobs:{function}", tensor * copies, tensor, *arguments)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, recipe_text):
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipe_text)
    return str(file)


def whole_state(folder):
    """Every tensor of the newest snapshot, whole."""
    snapshot = open_snapshot(snapshots(Path(folder))[-1])
    state = {
        name: torch.empty(told["shape"], dtype=getattr(torch, told["dtype"]))
        for name, told in snapshot.record["tensors"].items()
    }
    snapshot.read((name, Region(tensor, (0,) * tensor.ndim, tuple(tensor.shape))) for name, tensor in state.items())
    return state


@pytest.fixture(scope="module", params=list(KINDS))
def written(request, recipe, tmp_path_factory):
    """(recipe changes, the folder that each layout has written, the curve after it by one process)."""
    changes = [*KINDS[request.param], *MORE]
    folders, curves = {}, {}
    for layout in LAYOUTS:
        folders[layout] = str(tmp_path_factory.mktemp("snapshots"))
        said = on(layout, "save", recipe, [*changes, f"parallel.tensor={layout[0]}"], folders[layout], 2)
        assert all(one == said[0] for one in said)
        curves[layout] = said[0]
    assert all(curve == curves[1, 1] for curve in curves.values())
    return changes, folders, curves[1, 1]


def test_every_layout_writes_the_same_state(written, recipe):
    changes, folders, _ = written
    trainer = Trainer(load_recipe(recipe, changes), load_ops("cpu"))
    for _ in range(2):
        trainer.step()
    expected = {name: region.tensor for name, region in trainer.tensors()}
    assert any(name.startswith("master/") for name in expected) == ("model.dtype=bfloat16" in changes)
    for layout, folder in folders.items():
        state = whole_state(folder)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), layout


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_any_layout_reads_what_any_other_has_written(written, recipe, tensor, copies):
    changes, folders, curve = written
    for writer, folder in folders.items():
        state = whole_state(folder)
        names = set()
        for rank in on((tensor, copies), "load", recipe, [*changes, f"parallel.tensor={tensor}"], folder):
            for name, box, found in rank["held"]:
                assert found == digest(state[name][inside(box, [0] * len(box))]), (writer, name)
                names.add(name)
            assert rank["curve"] == curve, writer
            assert rank["read"] == rank["own"], writer  # not a byte that is not its own
        assert names == state.keys()


def test_ranks_that_hold_the_same_write_it_once(written):
    _, folders, _ = written
    sizes = {
        layout: sum(file.stat().st_size for file in snapshots(Path(folder))[-1].glob("*.safetensors"))
        for layout, folder in folders.items()
    }
    elements = sum(tensor.nbytes for tensor in whole_state(folders[1, 1]).values())
    assert all(0 < size - elements < 0.4 * elements for size in sizes.values())  # headers
    assert len(list(snapshots(Path(folders[2, 2]))[-1].glob("*.safetensors"))) == 2


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)])
def test_a_disk_that_is_full_for_one_rank_is_so_for_all(recipe, tmp_path, layout):
    """Told by a poll, at the end, and as the next one begins; what was whole stays."""
    changes = [*MORE, f"parallel.tensor={layout[0]}"]
    rank = 1 if layout[0] == 2 else 0  # one that writes
    said = on(layout, "full", recipe, changes, str(tmp_path), rank)
    refused = [errno.ENOSPC, f"rank-{rank:05d}-of-{layout[0] * layout[1]:05d}.safetensors"]
    assert said == [[refused, ["step-00000000"]] * 3 + [1]] * len(said)


def test_a_folder_that_cannot_be_made_is_told_to_every_rank(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    said = on((2, 1), "no_folder", recipe, [*MORE, "parallel.tensor=2"], str(tmp_path / "file"))
    assert said[0] is not None and said == [said[0]] * 2


@pytest.mark.parametrize("damage", ["changed", "gone", RECORD])
def test_ranks_pass_over_a_damaged_snapshot_together(recipe, tmp_path, damage):
    changes = [*MORE, "parallel.tensor=2"]
    for steps in (1, 2):
        on((2, 1), "save", recipe, changes, str(tmp_path), steps)
    newest = tmp_path / "step-00000002"
    file = newest / (RECORD if damage == RECORD else "rank-00001-of-00002.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    [first, second] = on((2, 1), "damaged", str(tmp_path))
    assert first == second
    step, [warning] = first
    assert step == 1 and warning.startswith(str(file)) and warning.endswith("going back to the snapshot before it")
    if damage != RECORD:
        assert warning.count("sha256") == (1 if damage == "gone" else 2)


def test_a_hole_between_ranks_is_named(recipe, tmp_path):
    said = on((2, 1), "hole", recipe, [*MORE, "parallel.tensor=2"], str(tmp_path))
    assert said == [said[0]] * 2 and said[0][1] == 0
    assert "first/model.layers.0.mlp.down_proj.weight has a hole: ranks hold " in said[0][0]
