"""Reads a server's /metrics as Prometheus asks for it: JSON in the one argument, JSON on the last line."""

import json
import sys
import urllib.request

from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

PARSERS = {
    "text/plain": parser.text_string_to_metric_families,
    "application/openmetrics-text": openmetrics.text_string_to_metric_families,
}
ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)

request = urllib.request.Request(json.loads(sys.argv[1])["url"] + "/metrics", headers={"Accept": ACCEPT})
with urllib.request.urlopen(request, timeout=60) as answer:
    kind, text = answer.headers["Content-Type"], answer.read().decode("utf-8", "strict")
families = list(PARSERS[kind.split(";")[0]](text))
print(
    json.dumps(
        {
            "kind": kind,
            "lines": sum(not line.startswith("#") for line in text.splitlines() if line),
            "families": [
                {
                    "name": family.name,
                    "type": family.type,
                    "says": family.documentation,
                    "samples": [[sample.name, sample.labels, str(sample.value)] for sample in family.samples],
                }
                for family in families
            ],
        }
    )
)
