"""The other process: reads records, a JSON object a line, and answers with what it sampled."""

import json
import sys
from pathlib import Path

from headrace.llm.records import ResumeRecord
from invariance.cells import Cell
from invariance.harness import finish


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        folders = {name: Path(folder) for name, folder in job["folders"].items()}
        records = {int(number): ResumeRecord.from_dict(data) for number, data in job["records"].items()}
        traces = finish(Cell(**job["cell"]), folders, records)
        out.write(json.dumps({n: trace.to_json() for n, trace in traces.items()}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
