"""/metrics: names, buckets, and counters that survive a restart of the instance."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.stats import SchedulerStats
from headrace.instance.wire import Explanation, Ready, StepReport
from headrace.llm.frontend import MaskStats
from headrace.llm.outputs import CompletionOutput, RequestOutput
from headrace.serve.metrics import ServerMetrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "lora_requests_info",
)
COUNTERS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_num_preemptions",
    "request_params_n",
    "request_params_max_tokens",
    "request_max_num_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_time_per_output_token_seconds",
    "iteration_tokens_total",
)
INFO = Ready(
    instance="0",
    pid=1,
    fingerprint="f",
    max_model_len=300,
    vocab_size=9,
    kv_tokens=640,
    kv_blocks=40,
    block_size=16,
    default_sampling_params={},
    startup_seconds=0.1,
)
MINE = {"model_name": "m", "engine": "0"}


def families(metrics):
    return {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}


def value(metrics, sample, **labels):
    """The one sample of that name with these labels."""
    found = [
        s.value
        for f in families(metrics).values()
        for s in f.samples
        if s.name == sample and s.labels.items() >= labels.items()
    ]
    assert len(found) == 1, (sample, labels, found)
    return found[0]


def report(prefill=0, decode=0, abort=0, **stats):
    ended = {"stop": 0, "length": 0, "abort": abort}
    values = asdict(SchedulerStats(**stats)) | asdict(MaskStats()) | {"finished": ended}
    return StepReport("0", values, prefill, decode, 0.002)


@pytest.fixture
def metrics():
    made = ServerMetrics("m")
    made.ready(INFO)
    return made


def test_every_name_of_vllm_is_there_with_its_type(metrics):
    found = families(metrics)
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        assert {n: found[f"vllm:{n}"].type for n in names} == dict.fromkeys(names, kind)


def test_labels_are_vllms(metrics):
    for name, family in families(metrics).items():
        for sample in family.samples:
            assert sample.labels.items() >= MINE.items(), name
    info = families(metrics)["vllm:cache_config_info"].samples
    cache = {"block_size": "16", "num_gpu_blocks": "40", "kv_cache_size_tokens": "640"}
    assert [s.labels for s in info] == [{**MINE, **cache, "kv_cache_max_concurrency": "2.13"}]
    assert {s.labels["finished_reason"] for s in families(metrics)["vllm:request_success"].samples} == {
        "stop",
        "length",
        "abort",
        "error",
    }


def edges(metrics, name):
    return [s.labels["le"] for s in families(metrics)[name].samples if s.name == name + "_bucket"]


def test_buckets_are_vllms(metrics):
    assert edges(metrics, "vllm:time_to_first_token_seconds") == [
        "0.001",
        "0.005",
        "0.01",
        "0.02",
        "0.04",
        "0.06",
        "0.08",
        "0.1",
        "0.25",
        "0.5",
        "0.75",
        "1.0",
        "2.5",
        "5.0",
        "7.5",
        "10.0",
        "20.0",
        "40.0",
        "80.0",
        "160.0",
        "640.0",
        "2560.0",
        "+Inf",
    ]
    assert edges(metrics, "vllm:request_prompt_tokens") == [
        "1.0",
        "2.0",
        "5.0",
        "10.0",
        "20.0",
        "50.0",
        "100.0",
        "200.0",
        "+Inf",
    ]
    assert edges(metrics, "vllm:inter_token_latency_seconds")[:3] == ["0.01", "0.025", "0.05"]
    assert edges(metrics, "vllm:e2e_request_latency_seconds")[-2:] == ["7680.0", "+Inf"]


def test_counters_go_on_where_a_new_instance_begins_anew(metrics):
    metrics.stepped(report(prefill=8, decode=1, generated_tokens=5, prefix_queries=10, preemptions=2, abort=1))
    metrics.stepped(report(decode=2, generated_tokens=7, prefix_queries=10, preemptions=2, abort=1))
    metrics.restarted("0")
    metrics.stepped(report(decode=8, generated_tokens=8, prefix_queries=3, abort=1))
    assert value(metrics, "vllm:generation_tokens_total") == 15
    assert value(metrics, "vllm:prefix_cache_queries_total") == 13
    assert value(metrics, "vllm:num_preemptions_total") == 2
    assert value(metrics, "headrace:aborts_total") == 2
    assert value(metrics, "headrace:restarts_total") == 1
    assert value(metrics, "headrace:step_tokens_total", kind="prefill") == 8
    assert value(metrics, "headrace:step_tokens_total", kind="decode") == 11
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 8 + 15
    assert value(metrics, "vllm:iteration_tokens_total_count") == 3


def test_drafts_are_counted_by_place_over_instances(metrics):
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert value(metrics, name, position="0") == 0
    metrics.stepped(report(decode=5, draft_steps=2, drafted_tokens=4, accepted_tokens=3, accepted_at=[2, 1]))
    metrics.stepped(report(decode=5, draft_steps=3, drafted_tokens=7, accepted_tokens=6, accepted_at=[3, 2, 1]))
    metrics.restarted("0")
    metrics.stepped(report(decode=2, draft_steps=1, drafted_tokens=1, accepted_tokens=1, accepted_at=[1]))
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 4
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 8
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 7
    assert [value(metrics, name, position=place) for place in "012"] == [4, 2, 1]


def test_gauges_are_of_the_last_step_and_fall_when_the_instance_dies(metrics):
    metrics.stepped(
        report(
            num_running=3,
            num_waiting=2,
            kv_usage=0.25,
            physical_blocks=10,
            cached_blocks=5,
            held_slots=160,
            used_slots=120,
        )
    )
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    assert value(metrics, "headrace:kv_waste_ratio") == 0.25
    blocks = {state: value(metrics, "headrace:kv_blocks", state=state) for state in ("held", "cached", "free")}
    assert blocks == {"held": 10, "cached": 5, "free": 25}
    metrics.restarted("0")
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "headrace:kv_blocks", state="free") == 40


def waiting(metrics):
    reasons = [value(metrics, "vllm:num_requests_waiting_by_reason", reason=r) for r in ("capacity", "deferred")]
    assert sum(reasons) == value(metrics, "vllm:num_requests_waiting")
    return reasons


def test_requests_wait_for_a_place_or_for_a_prefix(metrics):
    assert waiting(metrics) == [0, 0]
    metrics.stepped(report(decode=1, num_waiting=5, prefix_waits=2))
    assert waiting(metrics) == [3, 2]
    metrics.stepped(report(decode=1, num_waiting=4, prefix_waits=2))
    assert waiting(metrics) == [4, 0]
    metrics.stepped(report(decode=1, num_waiting=1, prefix_waits=5))
    assert waiting(metrics) == [0, 1]
    metrics.restarted("0")
    assert waiting(metrics) == [0, 0]


def test_a_step_counts_prompt_tokens_computed_and_tokens_generated(metrics):
    metrics.stepped(report(prefill=48))  # a part of a prompt
    metrics.stepped(report(prefill=2, decode=3, generated_tokens=4))
    metrics.stepped(report(decode=4, generated_tokens=4))  # all computed again after a preemption
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 48 + 2 + 4
    assert value(metrics, "vllm:iteration_tokens_total_count") == 2
    assert value(metrics, "headrace:step_time_seconds_count") == 3


def test_a_report_without_tokens_is_no_step(metrics):
    metrics.stepped(report(abort=1))
    assert value(metrics, "vllm:iteration_tokens_total_count") == 0
    assert value(metrics, "headrace:aborts_total") == 1


def test_a_request_is_measured_part_by_part(metrics):
    metrics.first_token("0", "a", 0.003)
    metrics.token_gap("0", "a", 0.02)
    output = RequestOutput("a", "p", [1, 2, 3, 4], [CompletionOutput(0, "x", [5, 6]), CompletionOutput(1, "y", [7])])
    times = Explanation(
        queue_time=1.0, prefill_time=2.0, decode_time=4.0, resumes=2, preemptions=3, num_cached_tokens=3
    )
    metrics.finished("0", "a", "length", SamplingParams(max_tokens=7, n=3), output, times, 8.0)
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == 0.003
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 1
    sums = [value(metrics, f"vllm:request_{k}_time_seconds_sum") for k in ("queue", "prefill", "decode", "inference")]
    assert sums == [1.0, 2.0, 4.0, 6.0]
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 8
    assert value(metrics, "vllm:request_generation_tokens_sum") == 3
    assert value(metrics, "vllm:request_max_num_generation_tokens_sum") == 2
    assert value(metrics, "vllm:request_prefill_kv_computed_tokens_sum") == 4 - 3
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == 4.0
    assert value(metrics, "vllm:request_prompt_tokens_sum") == 4
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "headrace:resumed_requests_total") == 2
    assert value(metrics, "vllm:request_params_n_sum") == 3
    assert value(metrics, "vllm:request_params_max_tokens_sum") == 7
    assert value(metrics, "vllm:request_num_preemptions_sum") == 3


def test_a_request_without_max_tokens_counts_with_what_its_context_leaves(metrics):
    output = RequestOutput("a", "p", [1, 2, 3, 4], [CompletionOutput(0, "x", [5])])
    metrics.finished("0", "a", "stop", SamplingParams(max_tokens=None), output, Explanation(), 8.0)
    assert value(metrics, "vllm:request_params_max_tokens_sum") == INFO.max_model_len - 4
    assert value(metrics, "vllm:request_time_per_output_token_seconds_count") == 0  # of one token


def test_a_refused_request_is_no_success_and_has_no_latency(metrics):
    metrics.arrived("0", "a", 4)
    metrics.finished("0", "a", "refused", SamplingParams(), RequestOutput("a", None, [1, 2, 3, 4], []), None, 0.5)
    assert value(metrics, "headrace:requests_total") == 1
    assert value(metrics, "headrace:refused_requests_total") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 0
    assert {s.value for s in families(metrics)["vllm:request_success"].samples if s.name.endswith("_total")} == {0}


def test_a_request_that_was_aborted_has_a_latency_and_no_parts(metrics):
    metrics.finished("0", "a", "abort", SamplingParams(), RequestOutput("a", None, [1, 2, 3, 4], []), None, 0.5)
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 0.5
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 0


def test_each_instance_has_samples_of_its_own(metrics):
    metrics.ready(replace(INFO, instance="1", kv_blocks=8))
    metrics.stepped(report(decode=1, generated_tokens=1))
    metrics.first_token("1", "a", 0.5)
    metrics.restarted("1")
    for sample, values in {
        "vllm:generation_tokens_total": (1, 0),
        "vllm:time_to_first_token_seconds_count": (0, 1),
        "headrace:restarts_total": (0, 1),
    }.items():
        assert tuple(value(metrics, sample, engine=engine) for engine in "01") == values
    assert value(metrics, "vllm:cache_config_info", engine="0", num_gpu_blocks="40") == 1
    assert value(metrics, "headrace:kv_blocks", engine="1", state="free") == 8


def test_requests_move_the_samples_of_a_server_as_they_move_vllms(server):
    count, ids, most = 3, list(range(5, 14)), 6
    expected = {
        "vllm:time_to_first_token_seconds_count": count,
        "vllm:inter_token_latency_seconds_count": count * (most - 1),
        "vllm:e2e_request_latency_seconds_count": count,
        "vllm:request_queue_time_seconds_count": count,
        "vllm:request_decode_time_seconds_count": count,
        "vllm:request_num_preemptions_count": count,
        "vllm:request_num_preemptions_sum": 0,
        "vllm:request_params_n_sum": count,
        "vllm:request_params_max_tokens_sum": count * most,
        "vllm:request_prompt_tokens_sum": count * len(ids),
        "vllm:request_generation_tokens_sum": count * most,
        "vllm:iteration_tokens_total_sum": count * (len(ids) + most),
        "vllm:iteration_tokens_total_count": count * most,
        "vllm:prompt_tokens_total": count * len(ids),
        "vllm:generation_tokens_total": count * most,
        "vllm:request_success_total": count,
    }
    before = {name: server.metric(name) for name in expected}
    for _ in range(count):
        assert server.post("/v1/completions", prompt=ids, max_tokens=most, ignore_eos=True).status_code == 200
    assert {name: server.metric(name) - before[name] for name in expected} == expected


def test_two_servers_in_one_process_share_nothing(metrics):
    other = ServerMetrics("other")
    other.ready(INFO)
    metrics.stepped(report(decode=1, generated_tokens=1))
    assert value(other, "vllm:generation_tokens_total") == 0


def test_the_dashboard_asks_only_for_what_is_there(metrics):
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = set(re.findall(r"(?:vllm|headrace):\w+", json.dumps(dashboard["panels"] + dashboard["templating"]["list"])))
    have = {s.name for f in families(metrics).values() for s in f.samples}
    assert asked and asked <= have, asked - have
    assert len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"])
    titles = {p["title"] for p in dashboard["panels"]}
    assert titles >= {
        "Time to first token",
        "Time between tokens",
        "End to end",
        "Running and waiting",
        "Prefix hit rate",
        "Tokens a second",
        "Preemptions",
        "Aborts",
    }
