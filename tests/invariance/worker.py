"""The other process: reads records, a JSON object a line, and answers with what it sampled."""

import json
import sys
from pathlib import Path

from headrace.llm.records import ResumeRecord
from invariance.harness import Cell, resume_here


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        records = {int(number): ResumeRecord.from_dict(data) for number, data in job["records"].items()}
        traces = resume_here(Cell(**job["cell"]), Path(job["folder"]), records)
        out.write(json.dumps({n: trace.to_json() for n, trace in traces.items()}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
