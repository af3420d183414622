"""The threads under the kernels' `prange`. Where other processes need the cores, a thread that waits sleeps soon.

Numba runs a parallel loop through one function, `numba_parallel_for`. Its OpenMP layer waits for every thread to do its
own share, so a loop takes as long as the thread that the system runs last, and its waiting threads poll for a fixed
time: too short on a quiet machine, and taken from other processes on a busy one. Here threads take tasks from a
ticket, so the calling thread alone can finish a loop. A thread that waits polls for 2 ms, since waking it takes longer
than most kernels, or, where its polls show that other processes use the cores, for 0.05 ms; then it sleeps.

One loop runs at a time: a second thread that calls a kernel meanwhile runs its loop alone. Which thread runs a task
changes no bits.

The owner of a loop writes its job before it publishes the ticket, and a thread reads the job only while it holds a
task, which the owner waits for: so no thread sees half a job.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import cfunc, njit
from numba.core import cgutils, types
from numba.np.ufunc import parallel

from headrace.kernels.cpu.launch import cached
from headrace.kernels.cpu.simd import operator

__all__ = ["arrive", "await_total", "start_threads", "works_here"]

PATIENCE, SHORT = 2_000_000, 50_000
"""Nanoseconds for which a thread polls before it sleeps, while the cores are ours and while others need them."""
GAP, MEMORY_OF_GAPS = 200_000, 50_000_000
"""Nanoseconds between two polls that show that another process had the core, and for how long that counts."""
MEMORY = "headrace_pool"
"""The symbol of the pool's memory. Code that names a symbol can be cached; code that holds an address cannot."""
# Offsets into it, in bytes. What different threads poll and write lies in different cache lines.
TICKET, LEFT, OWNED, TAKEN, WORKERS_ASLEEP, OWNER_ASLEEP, JOB, WORKERS, CALLS = range(0, 9 * 128, 128)
"""TICKET: tasks of the loop that no thread has taken. LEFT: those that have not ended. OWNED: 1 while a loop runs.
TAKEN: when a thread last saw that another process had its core. WORKERS_ASLEEP, OWNER_ASLEEP: threads that sleep, or
are about to, until TICKET or LEFT changes. JOB: function, stride, bytes of array addresses, steps, data. WORKERS: how
many there are. CALLS: for each task the addresses of its arrays, then its sizes: `stride` bytes. After `SIZE` bytes:
the workers' ids."""
SIZE = 1 << 16
FUTEX = {"x86_64": 202, "aarch64": 98}
"""Linux' numbers of the futex call, by machine."""
PAUSE: Any = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}
"""LLVM's names of the pause instruction, with their arguments."""
WAIT, WAKE_UP = 128, 129
"""The futex call's operations, within one process."""

I32, I64 = ir.IntType(32), ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()


def _operator(name: str, arity: int, emit: Callable[..., ir.Value]) -> Any:
    return operator(name, arity, emit, types.int64, types.int64)


def _at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, I64.as_pointer())


def _emit_load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load_atomic(_at(builder, address), "seq_cst", 8)


def _emit_store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    builder.store_atomic(value, _at(builder, address), "seq_cst", 8)
    return value


def _emit_add(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    return builder.atomic_rmw("add", _at(builder, address), value, "seq_cst")


def _emit_swap(builder: ir.IRBuilder, address: ir.Value, old: ir.Value, new: ir.Value) -> ir.Value:
    done = builder.extract_value(builder.cmpxchg(_at(builder, address), old, new, "seq_cst", "seq_cst"), 1)
    return builder.zext(done, I64)


def _emit_pause(builder: ir.IRBuilder) -> ir.Value:
    name, args = PAUSE[platform.machine()]
    shape = ir.FunctionType(ir.VoidType(), [I32] * len(args))
    builder.call(cgutils.get_or_insert_function(builder.module, shape, name), [ir.Constant(I32, arg) for arg in args])
    return ir.Constant(I64, 0)


def _emit_memory(builder: ir.IRBuilder) -> ir.Value:
    try:
        symbol = builder.module.get_global(MEMORY)
    except KeyError:
        symbol = ir.GlobalVariable(builder.module, ir.IntType(8), MEMORY)
    return builder.ptrtoint(symbol, I64)


def _emit_now(builder: ir.IRBuilder) -> ir.Value:
    """CLOCK_MONOTONIC in nanoseconds."""
    shape = ir.FunctionType(I32, [I32, I64.as_pointer()])
    function = cgutils.get_or_insert_function(builder.module, shape, "clock_gettime")
    time = cgutils.alloca_once(builder, I64, 2)
    builder.call(function, [ir.Constant(I32, 1), time])
    seconds, nanoseconds = (builder.load(builder.gep(time, [ir.Constant(I32, k)])) for k in (0, 1))
    return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), nanoseconds)


def _emit_self(builder: ir.IRBuilder) -> ir.Value:
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, []), "pthread_self"), [])


def _emit_futex(builder: ir.IRBuilder, address: ir.Value, operation: ir.Value, value: ir.Value) -> ir.Value:
    shape = ir.FunctionType(I64, [I64], var_arg=True)
    function = cgutils.get_or_insert_function(builder.module, shape, "syscall")
    number = ir.Constant(I64, FUTEX[platform.machine()])
    return builder.call(function, [number, address, operation, value, ir.Constant(I64, 0)])


def _emit_call(
    builder: ir.IRBuilder, function: ir.Value, arrays: ir.Value, sizes: ir.Value, steps: ir.Value, data: ir.Value
) -> ir.Value:
    pointer = builder.inttoptr(function, ir.FunctionType(ir.VoidType(), [BYTES] * 4).as_pointer())
    builder.call(pointer, [builder.inttoptr(value, BYTES) for value in (arrays, sizes, steps, data)])
    return ir.Constant(I64, 0)


load = _operator("load", 1, _emit_load)
store = _operator("store", 2, _emit_store)
add = _operator("add", 2, _emit_add)
swap = _operator("swap", 3, _emit_swap)
pause = _operator("pause", 0, _emit_pause)
memory = _operator("memory", 0, _emit_memory)
now = _operator("now", 0, _emit_now)
this_thread = _operator("this_thread", 0, _emit_self)
futex = _operator("futex", 3, _emit_futex)
call = _operator("call", 5, _emit_call)


@njit(nogil=True)
def _work(pool):
    """Run tasks until none is left to take."""
    while True:
        left = load(pool + TICKET)
        if left == 0:
            return
        if swap(pool + TICKET, left, left - 1):
            job = pool + JOB
            arrays = pool + CALLS + (left - 1) * load(job + 8)
            call(load(job), arrays, arrays + load(job + 16), load(job + 24), load(job + 32))
            add(pool + LEFT, -1)
            _wake(pool + LEFT, pool + OWNER_ASLEEP, 1)


@njit(nogil=True)
def _poll(pool, word, value):
    """Poll `word` until it has another value (True), or until it is time to sleep (False)."""
    began = last = now()
    while True:
        for _ in range(16):
            if load(word) != value:
                return True
            pause()
        time = now()
        if time - last > GAP:
            store(pool + TAKEN, time)
        last = time
        if time - began > (SHORT if time - load(pool + TAKEN) < MEMORY_OF_GAPS else PATIENCE):
            return False


@njit(nogil=True)
def _wait(pool, word, value, sleepers):
    """Wait until `word` has another value than `value`. Who changes it calls `_wake` with the same `sleepers`."""
    if not _poll(pool, word, value):
        # This thread counts itself, then looks at the word; the one that changes it does it the other way round.
        add(sleepers, 1)
        while load(word) == value:
            futex(word, WAIT, value)
        add(sleepers, -1)


@njit(nogil=True)
def _wake(word, sleepers, most):
    if load(sleepers) > 0:
        futex(word, WAKE_UP, most)


@njit(nogil=True)
def arrive(word, count, total, sleepers):
    """Add `count` to the int64 at `word`. The thread that makes it `total` wakes the threads in `await_total`."""
    if count > 0 and add(word, count) + count == total:
        _wake(word, sleepers, 1 << 30)


@njit(nogil=True)
def await_total(word, total, sleepers):
    """Wait until the int64 at `word` is `total`."""
    pool, value = memory(), load(word)
    while value < total:
        _wait(pool, word, value, sleepers)
        value = load(word)


def _worker(pool, number):
    store(pool + SIZE + 8 * number, this_thread())
    while True:
        _wait(pool, pool + TICKET, 0, pool + WORKERS_ASLEEP)
        _work(pool)


def _parallel_for(function, arrays, sizes, steps, data, inner_sizes, array_count, threads):
    """Numba's: function(arrays, sizes, steps, data) for sizes[0] tasks; array j begins task · steps[j] later."""
    pool, tasks = memory(), load(sizes)
    stride = 8 * (array_count + 1 + inner_sizes)
    if tasks == 1 or threads == 1 or tasks * stride > SIZE - CALLS or not swap(pool + OWNED, 0, 1):
        call(function, arrays, sizes, steps, data)
        return
    for task in range(tasks):
        to = pool + CALLS + task * stride
        for j in range(array_count):
            store(to + 8 * j, load(arrays + 8 * j) + task * load(steps + 8 * j))
        to += 8 * array_count
        store(to, 1)
        for j in range(1, 1 + inner_sizes):
            store(to + 8 * j, load(sizes + 8 * j))
    job = pool + JOB
    store(job, function)
    store(job + 8, stride)
    store(job + 16, 8 * array_count)
    store(job + 24, steps)
    store(job + 32, data)
    store(pool + LEFT, tasks)
    store(pool + TICKET, tasks)
    _wake(pool + TICKET, pool + WORKERS_ASLEEP, tasks - 1)
    _work(pool)
    left = load(pool + LEFT)
    while left > 0:
        _wait(pool, pool + LEFT, left, pool + OWNER_ASLEEP)
        left = load(pool + LEFT)
    store(pool + OWNED, 0)


def _thread_id():
    """Numba's `get_thread_id`: 0 in a thread that is not ours."""
    pool, this = memory(), this_thread()
    for number in range(load(pool + WORKERS)):
        if load(pool + SIZE + 8 * number) == this:
            return number + 1
    return 0


def works_here() -> bool:
    """Whether this system has the calls that the pool waits with."""
    return platform.system() == "Linux" and platform.machine() in FUTEX


@functools.cache
def start_threads() -> bool:
    """Start the pool, once: it runs the loops of all kernels that are compiled or loaded from now on. Whether it does.

    Where it does not work, or NUMBA_THREADING_LAYER names a layer, Numba's layer starts with the first loop.
    """
    config: Any = numba.config
    if config.THREADING_LAYER == "default" and works_here():
        _start(config.NUMBA_NUM_THREADS)
        return True
    return False


def _start(threads: int) -> None:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    # Never freed: threads use it until the process ends.
    pool = (libc.calloc(1, SIZE + 8 * threads + 128) + 127) // 128 * 128
    ctypes.c_int64.from_address(pool + WORKERS).value = threads - 1
    llvm.add_symbol(MEMORY, pool)
    with cached() as cache:
        worker: Any = cfunc(types.void(types.int64, types.int64), cache=cache)(_worker)
        loop: Any = cfunc(types.void(*[types.int64] * 8), cache=cache)(_parallel_for)
        thread_id: Any = cfunc(types.int64(), cache=cache)(_thread_id)
    layer: Any = parallel
    layer._launch_threads()  # the rest of a layer: how many threads a loop may use
    llvm.add_symbol("numba_parallel_for", loop.address)
    llvm.add_symbol("get_thread_id", thread_id.address)
    layer._get_thread_id = ctypes.CFUNCTYPE(ctypes.c_int)(thread_id.address)
    work = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(worker.address)  # ctypes releases the GIL
    for number in range(threads - 1):
        threading.Thread(target=work, args=(pool, number), name=f"kernels-{number + 1}", daemon=True).start()
