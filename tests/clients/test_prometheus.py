"""What Prometheus reads: every name that dashboards made for vLLM ask for, well formed, and right for a known load."""

import itertools

import pytest

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
}
FIRST_TOKEN = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
    float("inf"),
]
MINE = {"model_name": "tiny", "engine": "0"}


class Scrape:
    """One reading of /metrics."""

    def __init__(self, clients, server):
        told = clients.program("scrape.py", url=server.url)
        self.kind, self.lines = told["kind"], told["lines"]
        self.families = {family["name"]: family for family in told["families"]}
        self.samples = [
            (name, labels, float(value)) for family in told["families"] for name, labels, value in family["samples"]
        ]

    def value(self, name, **labels):
        """The one sample of this name with these labels."""
        [value] = [v for n, have, v in self.samples if n == name and have == MINE | labels]
        return value

    def buckets(self, name):
        """(edge, count) of a histogram, as they stand."""
        return [(float(have["le"]), v) for n, have, v in self.samples if n == f"{name}_bucket"]


@pytest.fixture(scope="module")
def loaded(clients, server):
    """(before, after, tokens of the prompts) of three requests for five tokens each."""
    before = Scrape(clients, server)
    prompts = [server.post("/tokenize", prompt=f"Tom has {i} coins and").json()["tokens"] for i in (3, 4, 5)]
    for prompt in prompts:
        answer = server.post("/v1/completions", model="tiny", prompt=prompt, max_tokens=5, ignore_eos=True)
        assert answer.json()["usage"]["completion_tokens"] == 5
    return before, Scrape(clients, server), sum(map(len, prompts))


def test_the_text_is_well_formed(loaded):
    _, scrape, _ = loaded
    assert scrape.kind.startswith(("text/plain; version=", "application/openmetrics-text; version="))
    assert scrape.lines == len(scrape.samples), "every line that is no comment is a sample"
    seen = [(name, *sorted(labels.items())) for name, labels, _ in scrape.samples]
    assert len(set(seen)) == len(seen), "no sample stands twice"
    for family in scrape.families.values():
        assert family["type"] in ("counter", "gauge", "histogram") and family["says"], family["name"]
        if family["type"] == "counter":
            assert all(
                name == f"{family['name']}_total" and float(value) >= 0
                for name, _, value in family["samples"]
                if not name.endswith("_created")
            )


def test_every_name_is_there_with_its_labels(loaded):
    _, scrape, _ = loaded
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        for name in names:
            family = scrape.families[f"vllm:{name}"]
            assert family["type"] == kind and family["samples"], name
            assert all(labels.items() >= MINE.items() for _, labels, _ in family["samples"]), name
    # No adapters are served: the name is there, and nothing is said of them.
    assert scrape.families["vllm:lora_requests_info"]["type"] == "gauge"


def test_histograms_are_cumulative(loaded):
    _, scrape, _ = loaded
    assert [edge for edge, _ in scrape.buckets("vllm:time_to_first_token_seconds")] == FIRST_TOKEN
    for name in HISTOGRAMS:
        buckets = scrape.buckets(f"vllm:{name}")
        assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(buckets)), name
        assert buckets[-1] == (float("inf"), scrape.value(f"vllm:{name}_count")), name
        assert scrape.value(f"vllm:{name}_sum") >= 0


def test_counters_match_the_load(loaded):
    before, after, prompt_tokens = loaded

    def grew(name, **labels):
        return after.value(f"vllm:{name}", **labels) - before.value(f"vllm:{name}", **labels)

    assert grew("generation_tokens_total") == grew("request_generation_tokens_sum") == 15
    assert grew("prompt_tokens_total") == grew("request_prompt_tokens_sum") == prompt_tokens > 15
    assert grew("request_success_total", finished_reason="length") == 3
    assert grew("request_success_total", finished_reason="stop") == 0
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
    ):
        assert grew(f"{name}_count") == 3, name
    assert grew("inter_token_latency_seconds_count") == 3 * 4
    assert grew("prefix_cache_queries_total") >= grew("prefix_cache_hits_total")
    assert after.value("vllm:num_requests_running") == after.value("vllm:num_requests_waiting") == 0
