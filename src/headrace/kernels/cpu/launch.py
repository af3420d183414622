"""How the CPU kernels are compiled, cached on disk and spread over threads.

`kernel` is the one decorator: IEEE arithmetic (no fast-math), no GIL, and machine code kept on disk. Numba's own
cache looks at the file of a kernel but not at the files it calls into, so the cache lives in a folder named after
*everything* the machine code depends on: `build_key`.

Threads: our own `pool` on Linux, elsewhere a layer of Numba's. Kernels split outputs over threads, never a sum, so
neither the layer nor the count changes a bit. A forked child
computes with its one thread; start processes with "spawn" where they shall have more.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import codegen
from numba.core.compiler_lock import global_compiler_lock

from headrace.config import require

__all__ = [
    "WIDE",
    "build_key",
    "cache_folder",
    "cached",
    "cpu_features",
    "cpu_name",
    "kernel",
    "set_threads",
    "source_key",
    "thread_count",
    "vector_features",
]

UNUSED_SECONDS = 30 * 24 * 3600.0
"""After so long without use, the folder of another build is removed."""
OURS = re.compile(r"[0-9a-f]{16}|pruned-\w+")
"""What we name folders of the cache, and those on their way out: nothing else is ever removed."""
numba_config: Any = numba.config  # as Any: its fields are set at run time
VECTOR_FEATURES = ("avx512f", "avx2", "avx", "f16c", "fma", "sse4.2", "neon", "sve")


def cpu_name() -> str:
    """LLVM's name of this CPU (or NUMBA_CPU_NAME, where set)."""
    return numba_config.CPU_NAME or llvm.get_host_cpu_name()


@functools.cache
def cpu_features() -> str:
    """What this CPU has, in LLVM's names, sorted: "+avx2,+fma,…" (or NUMBA_CPU_FEATURES, where set)."""
    chosen = numba_config.CPU_FEATURES
    features = codegen.get_host_cpu_features() if chosen is None else chosen
    return ",".join(sorted(name for name in features.split(",") if name.startswith("+")))


WIDE = "+avx512f" in cpu_features().split(",")
"""Whether there are 512-bit registers: two rows' eight lanes in one."""


def source_key(folder: Path | None = None) -> str:
    """Hash of the kernels' source, this folder's *.py. It is the kernel version of the fingerprint."""
    digest = hashlib.sha256()
    for path in sorted((folder or Path(__file__).parent).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build_key(folder: Path | None = None) -> str:
    """Hash of all that the machine code depends on: source, Numba, llvmlite, the CPU and its features."""
    parts = (source_key(folder), numba.__version__, llvmlite.__version__, cpu_name(), cpu_features())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept: HEADRACE_CACHE_DIR or ~/.cache/headrace/kernels, then `build_key`.

    None where that cannot be written: the kernels are then compiled anew in every process. Folders of other builds
    that no process has used for `UNUSED_SECONDS` are removed.
    """
    root = os.environ.get("HEADRACE_CACHE_DIR")
    try:
        folder = (Path(root) if root else Path.home() / ".cache" / "headrace" / "kernels") / build_key()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        os.utime(folder)
    except (OSError, RuntimeError):
        return None
    _prune(folder)
    return folder


def _prune(used: Path) -> None:
    """Remove the unused neighbours of `used`.

    Each is moved away whole before it is emptied, so no process reads half a cache: Numba finds no kernels there and
    compiles them again. Of two processes that prune at once, one moves a folder and the other skips it.
    """
    oldest = time.time() - UNUSED_SECONDS
    with contextlib.suppress(OSError), os.scandir(used.parent) as neighbours:
        for entry in neighbours:
            if not OURS.fullmatch(entry.name) or entry.name == used.name or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                if os.stat(entry.path).st_mtime >= oldest:
                    continue
                away = tempfile.mkdtemp(prefix="pruned-", dir=used.parent)
                with contextlib.suppress(OSError):
                    os.rename(entry.path, Path(away) / entry.name)
                shutil.rmtree(away, ignore_errors=True)


def kernel(function: Callable[..., Any] | None = None, *, parallel: bool = False) -> Any:
    """Compile `function` on first use, or take it from the cache. `parallel` allows `prange`."""
    if function is None:
        return functools.partial(kernel, parallel=parallel)
    with cached() as cache:
        made = numba.njit(
            nogil=True, fastmath=False, error_model="numpy", boundscheck=False, parallel=parallel, cache=cache
        )(function)
    folder = cache_folder()
    return made if folder is None else _compiled_once(made, folder / f"{function.__module__}.{function.__name__}.lock")


@contextlib.contextmanager
def cached() -> Iterator[bool]:
    """The context in which Numba decorates our functions: it reads then where its cache is. Whether there is one.

    Afterwards the folder is what it was, so other users of Numba keep theirs.
    """
    folder, before = cache_folder(), numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(folder or before)
    try:
        yield folder is not None
    finally:
        numba_config.CACHE_DIR = before


def _compiled_once(made: Any, lock: Path) -> Any:
    """`made`, compiled by one process at a time: the others wait and then load it from the cache.

    Two processes that save to Numba's cache at once may give their machine code the same file name, and then one
    index names the code of another signature. Numba's own lock is taken first, so that threads cannot deadlock.
    """
    compile_one = made.compile

    def compile_alone(signature: Any) -> Any:
        with global_compiler_lock, _held(lock):
            return compile_one(signature)

    made.compile = compile_alone
    return made


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """The lock of this file among processes; nothing where the file cannot be made or its system has no locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def vector_features() -> str:
    """The features that decide which vector instructions a kernel is made of, e.g. "avx2+f16c+fma"."""
    has = set(cpu_features().split(","))
    return "+".join(name for name in VECTOR_FEATURES if f"+{name}" in has) or cpu_name()


def thread_count(threads: int | None) -> int:
    """`threads` clipped to the CPUs that Numba sees; None or 0 is all of them."""
    require(threads is None or threads >= 0, f"threads={threads} must be 0 (all CPUs) or more")
    return min(threads or numba_config.NUMBA_NUM_THREADS, numba_config.NUMBA_NUM_THREADS)


def set_threads(threads: int) -> None:
    """Let the parallel kernels that the *calling* thread launches use `threads` threads."""
    if getattr(_calling, "threads", 0) != threads:
        numba.set_num_threads(threads)
        _calling.threads = threads


_calling = threading.local()
