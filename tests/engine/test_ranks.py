"""Ranks of one model: frames between them, their start, their failures and their end."""

import io

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.attention.context import packed_meta
from headrace.cache.manager import BlockMoves
from headrace.engine.run.frames import frame, read_frame, read_step, step_frame
from headrace.engine.run.ranks import RankDiedError, Ranks
from headrace.engine.run.shard import Inputs
from headrace.errors import CheckpointError, ConfigError, HeadraceError
from headrace.parallel.group import DistributedGroup
from headrace.parallel.links import LinkError, SocketLink

PAIRS = st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), max_size=5)
CPU = torch.device("cpu")


@pytest.fixture
def started():
    """A function that returns the rank processes that this test has started."""
    before = rank_processes()
    return lambda: rank_processes() - before


def rank_processes():
    return {child for child in psutil.Process().children() if "headrace.engine.run.rank" in child.cmdline()}


@given(PAIRS, PAIRS, PAIRS, st.lists(st.integers(1, 40), max_size=4), st.integers(0, 3))
def test_a_step_frame_round_trips(out, back, copies, lengths, wanted):
    moves = BlockMoves(out, back, copies)
    total = sum(lengths)
    inputs = None
    if lengths:
        inputs = Inputs(
            torch.arange(total), torch.arange(total) * 2, packed_meta(lengths, 8, CPU), torch.arange(min(wanted, total))
        )
    read = read_frame(io.BytesIO(step_frame(moves, inputs)))
    assert read is not None
    kind, values, arrays = read
    assert kind == "step"
    got_moves, got = read_step(values, arrays, CPU)
    assert got_moves == moves and (got is None) == (inputs is None)
    if inputs is not None and got is not None:
        for name in ("ids_T", "positions_T", "rows_R"):
            assert torch.equal(getattr(got, name), getattr(inputs, name))
        for name in ("block_table_SM", "query_start_S1", "context_len_S", "slots_T"):
            ours, theirs = getattr(got.meta, name), getattr(inputs.meta, name)
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert (got.meta.max_query, got.meta.max_context) == (inputs.meta.max_query, inputs.meta.max_context)


def test_a_stream_that_ends_anywhere_is_the_end():
    whole = frame("hidden", {"ids": [1, 2]}, {"x": np.arange(6, dtype=np.int32).reshape(2, 3)})
    assert [read_frame(io.BytesIO(whole[:cut])) for cut in range(len(whole))] == [None] * len(whole)
    read = read_frame(io.BytesIO(whole))
    assert read is not None
    _, values, arrays = read
    assert values == {"ids": [1, 2]} and arrays["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_engine_of_two_ranks_ends_with_its_processes(tinyworld_checkpoint, started):
    params = SamplingParams(temperature=0.0, max_tokens=8)
    alone = LLM(tinyworld_checkpoint).generate("Once upon", params)[0].outputs[0]
    with LLM(tinyworld_checkpoint, tensor_parallel_size=2) as llm:
        [rank] = started()
        assert llm.generate("Once upon", params)[0].outputs[0] == alone
        rank.kill()
        with pytest.raises(RankDiedError, match="rank 1 of 2 ended with status -9"):
            llm.generate("Once upon", params)
    with LLM(tinyworld_checkpoint, tensor_parallel_size=2, queue_depth=2) as llm:
        [rank] = started()
        assert llm.generate("Once upon", params)[0].outputs[0] == alone
    assert not rank.is_running()


def test_a_rank_that_cannot_load_reports_the_reason(tmp_path):
    ranks = Ranks.start(2, tmp_path / "nothing", "cpu", [{"threads": 1}] * 2, "auto", CPU, 120.0)
    try:
        with pytest.raises(HeadraceError, match=r"rank 1 of 2: .*nothing"):
            ranks.initialize_cache(num_blocks=4, block_size=8, cache_dtype="float32", host_slots=0)
    finally:
        ranks.close()
    with pytest.raises(HeadraceError, match="rank 1 of 2: kernels='no such kernels' is not one of"):
        Ranks.start(2, tmp_path, "no such kernels", [{}, {}], "auto", CPU, 120.0)


def test_a_rank_that_is_late_is_named(tinyworld_checkpoint, started):
    with pytest.raises(ConfigError, match=r"rank 1 of 2 was not started within 0\.01 s: .* or raise rank_timeout"):
        LLM(tinyworld_checkpoint, tensor_parallel_size=2, rank_timeout=0.01)
    assert not started()
    with LLM(tinyworld_checkpoint, tensor_parallel_size=2, rank_timeout=99) as llm:
        [rank] = started()
        group = llm.frontend.engine.runner.model.group
        assert isinstance(group, DistributedGroup) and isinstance(group._link, SocketLink)
        assert group._link._timeout == 99
        group._link = SocketLink(group._link._sockets, 0.2)  # a shorter timeout than the start needs
        rank.suspend()
        with pytest.raises(LinkError, match=r"rank 1 is silent for 0\.2 s"):
            llm.generate("Once upon", SamplingParams(max_tokens=8))
        rank.resume()


def test_a_model_that_cannot_be_split_so_starts_nothing(tinyworld_checkpoint, started):
    with pytest.raises(ConfigError, match="tensor parallelism of 8 does not divide"):
        LLM(tinyworld_checkpoint, tensor_parallel_size=8)
    with pytest.raises(CheckpointError):
        LLM(tinyworld_checkpoint / "nothing", tensor_parallel_size=2)
    assert not started()
