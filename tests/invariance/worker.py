"""The other process: reads records, a JSON object a line, and answers with what it sampled."""

import json
import sys
from pathlib import Path

from invariance.cells import Cell
from invariance.harness import finish


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        folders = {name: Path(folder) for name, folder in job["folders"].items()}
        traces = finish(Cell(**job["cell"]), folders, {int(n): r for n, r in job["records"].items()})
        out.write(json.dumps({n: trace.to_json() for n, trace in traces.items()}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
