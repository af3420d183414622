"""Every example runs, as its first lines say."""

import subprocess
import sys
from pathlib import Path

from serve.http_kit import served

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments, cwd):
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *(str(a) for a in arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_own_batching(tinyworld_checkpoint, tmp_path):
    out = run("own_batching.py", tinyworld_checkpoint, cwd=tmp_path)
    assert out.splitlines()[-1] == "the same tokens" and "fair: " in out


def test_openai_client(tinyworld_checkpoint, tmp_path):
    with served(tinyworld_checkpoint) as server:
        lines = run("openai_client.py", server.url, cwd=tmp_path).splitlines()
    assert len(lines) >= 9 and all(float(line.split()[-1]) <= 0 for line in lines[-8:])


def test_tools(tinyworld_checkpoint, tmp_path):
    with served(tinyworld_checkpoint) as server:
        first, *_, last = run("tools.py", server.url, cwd=tmp_path).splitlines()
    assert first.startswith("the model calls find with {'who': ") and last.startswith("as JSON: {'name': ")


def test_own_text(tmp_path):
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 400)
    out = run("own_text.py", "own", "fox.txt", "--steps=40", cwd=tmp_path)
    assert out.splitlines()[-1].startswith("The quick brown fox ")


def test_rl_logprobs(tmp_path):
    out = run("rl_logprobs.py", cwd=tmp_path)
    assert out.count("max |Δ| = 0\n") == 2
