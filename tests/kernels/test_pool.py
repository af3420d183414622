"""The threads under the kernels' loops."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from numba import get_num_threads, get_thread_id, prange, set_num_threads

from headrace.kernels.cpu import CpuOps, pool
from headrace.kernels.cpu.launch import kernel

pytestmark = pytest.mark.skipif(not pool.works_here(), reason="Numba's own threads run the loops here")


@kernel(parallel=True)
def count_visits(visits, rounds):
    for i in prange(visits.size):
        for _ in range(rounds):
            visits[i] += 1


@kernel(parallel=True)
def name_threads(ids):
    for i in prange(ids.size):
        ids[i] = get_thread_id()


@pytest.fixture(autouse=True)
def all_threads():
    CpuOps()
    before = get_num_threads()
    yield
    set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 1000])
def test_every_index_is_visited_once(size):
    for _ in range(200):
        visits = np.zeros(size, np.int64)
        count_visits(visits, 1)
        assert (visits == 1).all()


def test_threads_that_call_kernels_at_once_disturb_no_results():
    failed = []

    def call_many() -> None:
        for _ in range(300):
            visits = np.zeros(64, np.int64)
            count_visits(visits, 50)
            if not (visits == 50).all():
                failed.append(visits)

    callers = [threading.Thread(target=call_many) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed


def test_threads_of_a_loop_have_numbers_of_their_own():
    ids = np.full(1000, -1)
    for _ in range(50):
        name_threads(ids)
        assert set(ids.tolist()) <= set(range(get_num_threads()))
    assert get_thread_id() == 0


SCRIPT = """
import hashlib, torch
from headrace.kernels.cpu import CpuOps
ops = CpuOps()
torch.manual_seed(0)
x, w = torch.randn(33, 96), torch.randn(200, 96).bfloat16()
for _ in range(300):
    y = ops.linear(x, w, None, (0, 64, 96))
print(ops.threads, hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""


def test_more_threads_than_cores_and_one_have_the_same_bits():
    found = {}
    for threads in ("1", "2", "9"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"NUMBA_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        found[threads] = done.stdout.split()
    assert [count for count, _ in found.values()] == ["1", "2", "9"]
    assert len({digest for _, digest in found.values()}) == 1


FORKED = """
import os, torch
from headrace.kernels.cpu import CpuOps
ops = CpuOps(threads=2)
x, w = torch.ones(4, 64), torch.ones(8, 64)
before = ops.linear(x, w)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(ops.linear(x, w), before) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["0"]


def test_a_thread_without_work_sleeps():
    """Its state is S, and not R, once it has polled for long enough."""
    ops = CpuOps()
    ops.linear(torch.ones(4, 64), torch.ones(8, 64))
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("kernels-")]
    assert len(workers) == int(os.environ.get("NUMBA_NUM_THREADS", len(os.sched_getaffinity(0)))) - 1
    for worker in workers:
        for _ in range(100_000):
            with open(f"/proc/self/task/{worker.native_id}/stat", encoding="ascii") as file:
                if file.read().rpartition(")")[2].split()[0] == "S":
                    break
            os.sched_yield()
        else:
            pytest.fail(f"{worker.name} never sleeps")
