"""From text of your own to a server: build a data folder, train a small model on it, serve it, ask it.

    python examples/own_text.py runs/own books/*.txt

It learns a tokenizer of 512 tokens and trains headrace's demo model; larger models: docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

HEADRACE = [sys.executable, "-m", "headrace"]


def main() -> None:
    """The commands, as you would type them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--steps", default="300")
    given = parser.parse_args()
    out, texts, steps = given.out, given.texts, given.steps
    data, run = f"{out}/data", f"{out}/run"
    headrace("data", "build", *texts, "--out", data, "--vocab-size", "512", "--force")
    source = ("--set", f"data.source={data}", "--set", "data.vocab_size=0", "--set", "data.shuffle=pieces")
    headrace("train", "demo", "--out", run, *source, "--set", f"train.steps={steps}")
    opening = Path(texts[0]).read_text(encoding="utf-8")[:20]
    print(opening + complete(f"{run}/hf", opening))


def headrace(*words: str) -> None:
    """Run one command; ends the example if it fails."""
    print("headrace", *words, flush=True)
    subprocess.run([*HEADRACE, *words], check=True)


def complete(checkpoint: str, prompt: str) -> str:
    """Serve the model at a free port for one request."""
    with subprocess.Popen([*HEADRACE, "serve", checkpoint, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            url = re.search(r"http://\S+", ready)
            assert url is not None, ready
            body = json.dumps({"prompt": prompt, "max_tokens": 40, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url[0]}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
