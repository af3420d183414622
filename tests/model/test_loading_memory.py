"""A model is loaded to serve within its weights and one tensor more: the process may allocate no more than that."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.bench.models import SHAPES, random_checkpoint

CONFIG = replace(SHAPES["tiny"], vocab_size=20_000, hidden_size=512, intermediate_size=1536, dtype="bfloat16")
LARGEST = 2 * 20_000 * 512
SCRIPT = """
import resource, sys
from pathlib import Path
from headrace.kernels.load import load_ops
from headrace.model.huggingface import load_model

ops = load_ops("cpu", threads=1)
load_model(Path(sys.argv[1]), ops, serving=True)  # what is imported and allocated once
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[3]),) * 2)
load_model(Path(sys.argv[2]), ops, serving=True)
"""


def held(folders: list[Path]) -> int:
    """Bytes of the weights in memory, and of the file, whose mapping counts too."""
    return 2 * sum(file.stat().st_size for file in folders[1].glob("*.safetensors"))


def load_within(folders: list[Path], size: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, folders), str(size)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A checkpoint that is small, and one whose largest tensor is most of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [random_checkpoint("tiny", folder / "tiny"), random_checkpoint(CONFIG, folder / "large")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
def test_loading_takes_the_weights_and_little_more_than_one_tensor(folders):
    done = load_within(folders, held(folders) + int(1.1 * LARGEST))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
def test_less_than_the_weights_is_not_enough(folders):
    """The limit stops a process that needs more."""
    done = load_within(folders, int(0.9 * held(folders)))
    assert done.returncode != 0 and "no memory on cpu" in done.stderr
