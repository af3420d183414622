"""Who keeps what: every element once, cuts between chunks, the checkpoint's tensors covered, whatever the layout."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.parallel.group import RankGroup
from headrace.zero.collectives import CollectiveQueue
from headrace.zero.layout import divide, lay_out
from headrace.zero.memory import Arena, Host
from headrace.zero.sharded import Sharded


@given(st.sets(st.integers(0, 200), min_size=2), st.integers(1, 9))
def test_division_rises_through_points_that_are_nearest_to_equal_shares(points, parts):
    points = sorted(points)
    cuts = divide(points, points[0], points[-1], parts)
    assert len(cuts) == parts + 1 and cuts[0] == points[0] and cuts[-1] == points[-1]
    assert list(cuts) == sorted(cuts) and set(cuts) <= set(points)
    gap = max(b - a for a, b in pairwise(points))
    assert all(abs(cut - (points[0] + (points[-1] - points[0]) * i // parts)) <= gap for i, cut in enumerate(cuts))


@st.composite
def layouts(draw):
    heads = draw(st.sampled_from([2, 4]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    config = ModelConfig(
        "Qwen3ForCausalLM",
        draw(st.integers(300, 900)),
        8 * draw(st.integers(1, 8)),
        draw(st.integers(20, 200)),
        draw(st.integers(1, 3)),
        heads,
        kv_heads,
        2 * draw(st.integers(1, 6)),
        64,
        tie_word_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )
    tensor = draw(st.sampled_from([n for n in (1, 2, 4) if config.shards % n == 0]))
    return config, tensor, draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(500, 40_000))


@given(layouts())
@settings(deadline=None, max_examples=30)
def test_slots_hold_every_element_once_and_end_between_chunks(layout):
    config, tensor, copies, bucket = layout
    for unit in lay_out(config, RankGroup.of_size(tensor, tensor - 1), copies, bucket):
        points = set().union(*(member.cuts() for member in unit.members))
        ends = [cut for cuts in unit.buckets for cut in cuts]
        assert set(ends) <= points and ends == sorted(ends)
        assert unit.buckets[0][0] == 0 and unit.buckets[-1][-1] == unit.size
        assert all(a[-1] == b[0] for a, b in pairwise(unit.buckets))
        covered = sorted(run for slot in range(copies) for run in unit.slots(slot) if run[0] < run[1])
        assert covered[0][0] == 0 and covered[-1][1] == unit.size
        assert all(a[1] == b[0] for a, b in pairwise(covered))


def sharded(config, tensor, rank, copies, copy, stage, bucket):
    """One rank's, without the others and without a step."""
    from headrace.kernels.reference import ReferenceOps
    from headrace.model.transformer import Transformer
    from headrace.zero.deferred import DeferredOps

    group, data = RankGroup.of_size(tensor, rank), RankGroup.of_size(copies, copy)
    model = Transformer(config, DeferredOps(ReferenceOps(), config.shards // tensor), group=group)
    return Sharded(model, data, stage, bucket, overlap=False)


@given(layouts(), st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_ranks_together_keep_each_element_of_the_checkpoint_once(layout, stage):
    config, tensor, copies, bucket = layout
    found: dict[str, np.ndarray] = {}
    for rank in range(tensor):
        for copy in range(copies):
            one = sharded(config, tensor, rank, copies, copy, stage, bucket)
            for name, part in one.regions("model", [slot.weights for slot in one.slots]):
                seen = found.setdefault(name, np.zeros(part.shape, int))
                at = tuple(slice(a, a + n) for a, n in zip(part.start, part.tensor.shape))
                assert seen[at].shape == tuple(part.tensor.shape)
                seen[at] += part.writes
    assert all((seen == 1).all() for seen in found.values())
    names = {"model.embed_tokens.weight", "model.norm.weight"} | (
        set() if config.tie_word_embeddings else {"lm_head.weight"}
    )
    assert {f"model/{name}" for name in names} <= set(found)


@given(layouts())
@settings(deadline=None, max_examples=25)
def test_chunks_of_the_norm_are_the_same_for_every_layout(layout):
    """Their sums are marks of what is summed: every element has a number of its own, the same wherever it lies."""
    config, tensor, copies, bucket = layout

    def marks(tensor, copies, stage):
        numbers: dict[str, torch.Tensor] = {}
        found = []
        for rank in range(tensor):
            for copy in range(copies):
                if stage == 0 and copy:
                    continue
                one = sharded(config, tensor, rank, copies, copy, stage, bucket)
                filled = [torch.zeros(slot.weights.numel(), dtype=torch.float64) for slot in one.slots]
                for name, part in one.regions("model", filled):
                    whole = numbers.setdefault(
                        name,
                        torch.rand(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name))),
                    )
                    at = tuple(slice(a, a + n) for a, n in zip(part.start, part.tensor.shape))
                    part.tensor.copy_(whole[at])
                for flat, chunk in one.chunks(filled):
                    found += [tuple(run.tolist()) for run in flat.split(chunk)]
        return sorted(found)

    assert marks(tensor, copies, 2) == marks(1, 1, 0)


def test_memory_beside_the_device_is_a_file_without_a_name(tmp_path):
    host = Host(torch.device("cpu"), str(tmp_path))
    state = host.zeros(1000)
    state += 1.0
    assert float(state.sum()) == 1000.0 and host.nbytes == 4000
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"cannot hold 4398046511104 MiB of offloaded state.*offload_folder"):
        host.zeros(1 << 60)


def test_an_arena_makes_a_buffer_only_when_none_is_free():
    arena = Arena(10, torch.bfloat16, torch.device("cpu"))
    first, second = arena.take(), arena.take()
    arena.put_back(first)
    assert arena.take() is first and arena.count == 2 and arena.nbytes == 40
    assert second.dtype == torch.bfloat16


def test_collectives_run_in_order_and_errors_reach_the_one_who_waits():
    said: list[int] = []
    queue = CollectiveQueue(overlap=True)
    for i in range(5):
        queue.submit(partial(said.append, i))
    queue.wait_until(1)
    assert said[:4] == [0, 1, 2, 3]
    queue.submit(lambda: SimpleNamespace().missing)
    with pytest.raises(AttributeError):
        queue.drain()
    queue.close()
