"""Collectives between real processes: the balanced tree's bits, what is counted, and a rank that leaves or is late."""

import socket
import threading

import pytest
import torch
import torch.distributed as dist

from headrace.errors import ConfigError
from headrace.kernels.shards import tree
from headrace.parallel.group import RankGroup
from headrace.parallel.links import LinkError, SocketLink
from headrace.parallel.rendezvous import connect, join, keep_store
from parallel.group_jobs import SIZES, numbers
from parallel.rank_kit import run_ranks


@pytest.fixture(
    scope="module", params=[(2, "socket"), (2, "gloo"), (4, "socket"), (4, "gloo")], ids=lambda p: f"{p[0]}-{p[1]}"
)
def collected(request):
    size, link = request.param
    return size, run_ranks("parallel.group_jobs:collectives", size, link=link)


def test_sums_are_the_balanced_tree_on_every_rank(collected):
    size, answers = collected
    for n, shape in enumerate(SIZES):
        parts = [numbers(rank, shape, n) for rank in range(size)]
        expected = tree(parts).flatten().tolist()
        assert all(answer[f"all_reduce {n}"] == expected for answer in answers)
        for rank, answer in enumerate(answers):
            first = rank // 2 * 2
            assert answer[f"pairs {n}"] == (parts[first] + parts[first + 1]).flatten().tolist()


def test_rows_are_scattered_and_gathered_in_order(collected):
    size, answers = collected
    for n, shape in enumerate(SIZES):
        total = tree([numbers(rank, (4 * shape[0], 3), n) for rank in range(size)])
        for rank, answer in enumerate(answers):
            assert answer[f"scatter {n}"] == total.chunk(size)[rank].flatten().tolist()
            assert answer[f"gather {n}"] == total.flatten().tolist()


def test_columns_come_together_on_rank_0(collected):
    size, answers = collected
    for n in range(len(SIZES)):
        parts = [numbers(rank, (5, 2 + rank), n) for rank in range(size)]
        assert answers[0][f"columns {n}"] == torch.cat(parts, 1).tolist()
        assert answers[1][f"columns {n}"] == parts[1].tolist()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rows", [8, 1024])
def test_messages_volume_and_bytes_are_counted(size, rows):
    width = 64
    for answer in run_ranks("parallel.group_jobs:traffic", size, rows, width):
        n = rows * width
        once = {("all_gather", "norm"), ("all_reduce", "sum"), ("reduce_scatter", "norm")}
        assert {tuple(m) for m in answer["messages"]} == {(*key, 1) for key in once}
        assert [count for *_, count in answer["elements"]] == [n, n, n]
        assert answer["volume"] == 4 * n and answer["volume of norms"] == 2 * n
        halving = 2 * n * (size - 1) // size
        whole = n * (size.bit_length() - 1)
        assert answer["bytes"] == 4 * ((halving if n >= 1 << 15 and size > 2 else whole) + halving)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_f_and_g_are_conjugate(size):
    answers = run_ranks("parallel.group_jobs:operators", size)
    xs = [numbers(rank, (8, 3)) for rank in range(size)]
    grads = [numbers(rank, (8, 3), 1) for rank in range(size)]
    for rank, answer in enumerate(answers):
        assert answer["f"] == [xs[rank].tolist(), tree(grads).tolist()]
        assert answer["g"] == [tree(xs).tolist(), grads[rank].tolist()]
        assert answer["f_rows"][0] == torch.cat(xs).tolist()
        wide = [numbers(r, (8 * size, 3), 1) for r in range(size)]
        assert answer["f_rows"][1] == tree(wide).chunk(size)[rank].tolist()
        assert answer["g_rows"][0] == tree(xs).chunk(size)[rank].tolist()
        short = [numbers(r, (8 // size, 3), 1) for r in range(size)]
        assert answer["g_rows"][1] == torch.cat(short).tolist()


def test_a_rank_that_leaves_is_missed_at_once():
    answers = run_ranks("parallel.group_jobs:lonely", 2)
    assert answers[1] == "left" and answers[0].startswith("rank 1 has gone")


def test_a_rank_that_is_silent_is_not_waited_for_for_ever():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    link = SocketLink({1: ours}, 0.1)
    with pytest.raises(LinkError, match=r"rank 1 is silent for 0\.1 s"):
        link.receive(torch.empty(3), 1)
    with pytest.raises(LinkError, match=r"rank 1 takes nothing for 0\.1 s"):
        link.send(torch.empty(10**7), 1)
    theirs.close()
    with pytest.raises(LinkError, match="rank 1 has gone"):
        link.exchange(torch.empty(3), torch.empty(3), 1)
    link.close()


def test_a_rank_that_does_not_come_is_named():
    store = keep_store(4, 5.0)
    others = [threading.Thread(target=lambda r=r: _try(store.port, r)) for r in (1, 3)]
    for other in others:
        other.start()
    with pytest.raises(ConfigError, match=r"rank 2 of 4 did not come within 0\.5 s"):
        connect(store, 0, 4, torch.device("cpu"), 0.5)
    for other in others:
        other.join()
    assert not dist.is_initialized()


def _try(port, rank):
    with pytest.raises(ConfigError):
        connect(join(port, 4, 5.0), rank, 4, torch.device("cpu"), 0.5)


def test_a_layout_that_cannot_be_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="tensor parallelism of 4 does not divide the model's 2 virtual shards"):
        RankGroup.of_size(4).require_shards(2)
    assert [list(RankGroup.of_size(4, rank).own(2)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert list(RankGroup.of_size(2, 1).own(8)) == [4, 5, 6, 7]
