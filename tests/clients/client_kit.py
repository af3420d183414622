"""Clients as their users run them: their own programs, in an environment of their own, with no network."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Clients:
    """The environment that `make test-clients` made. `folder` holds its commands; `home` is the clients' own."""

    folder: Path
    home: Path

    def run(self, command: str, *arguments: object) -> str:
        """What a command of the environment printed; it must end well."""
        environ = os.environ | {
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "default",
        }
        done = subprocess.run(
            [self.folder / command, *map(str, arguments)],
            env=environ,
            cwd=self.home,
            timeout=240,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def program(self, name: str, **fields: object) -> Any:
        """What a file of `programs/` answered to these fields; both are JSON, and its answer is its last line."""
        return json.loads(self.run("python", PROGRAMS / name, json.dumps(fields)).splitlines()[-1])
