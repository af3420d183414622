"""`ServerMetrics`: Prometheus metrics under vLLM's names and, where it has none, under `headrace:`.

One object per server, with a registry of its own; the label `engine` is the name of an instance. Every observation is
a few additions on the event loop, and reading is one pass over some hundred numbers, so a scrape never waits for the
engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from headrace.engine.schedule.sampling import SamplingParams
from headrace.instance.wire import Explanation, Ready, StepReport
from headrace.llm.outputs import RequestOutput

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""The media type of `ServerMetrics.render`."""

LABELS = ("model_name", "engine")
REASONS = ("stop", "length", "abort", "error")

# vLLM's bucket edges, which its dashboards expect: seconds and tokens.
FIRST_TOKEN = (
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
)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# name: (field of `SchedulerStats`, help). The engine counts from 0 in every process; these never decrease.
ENGINE_COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "vllm:prompt_tokens_cached": ("prefix_hits", "Prompt tokens that were not computed, as the cache had them."),
    "vllm:num_preemptions": ("preemptions", "Times a running request gave way and was computed again later."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted choices, those that the cache had included."),
    "vllm:generation_tokens": ("generated_tokens", "Tokens generated, those of clients that left included."),
    "headrace:forced_tokens": ("forced_tokens", "Tokens that a constraint left no choice about: they are not sampled."),
    "vllm:spec_decode_num_drafts": ("draft_steps", "Drafts that were verified: of one request in one step."),
    "vllm:spec_decode_num_draft_tokens": ("drafted_tokens", "Tokens in drafts."),
    "vllm:spec_decode_num_accepted_tokens": ("accepted_tokens", "Tokens of drafts that became output."),
    "headrace:mask_seconds": ("mask_seconds", "Seconds of filling masks, on a thread beside the model."),
    "headrace:mask_wait_seconds": ("mask_wait_seconds", "Seconds that steps waited for masks."),
    "headrace:grammar_compile_seconds": ("grammar_seconds", "Seconds of compiling constraints."),
    "headrace:grammar_cache_queries": ("grammar_queries", "Constraints that were looked up among the compiled ones."),
    "headrace:grammar_cache_hits": ("grammar_hits", "Constraints that were found among the compiled ones."),
    "headrace:steps": ("steps", "Steps of the engine."),
    "headrace:swapped_blocks": ("swapped_blocks", "KV blocks moved to the host and back."),
    "headrace:copied_blocks": ("copied_blocks", "KV blocks copied because a request wrote to a shared one."),
    "headrace:discarded_tokens": ("discarded_tokens", "Tokens computed for requests that had stopped meanwhile."),
    "headrace:kv_held_token_steps": ("held_slot_steps", "Token slots that requests held, summed over steps."),
    "headrace:kv_used_token_steps": ("used_slot_steps", "Of the held token slots, those filled, summed over steps."),
}
GROWING = {*(field for field, _ in ENGINE_COUNTERS.values()), "prefix_waits"}  # each once: see `_growth`
REQUEST_TIMES = {
    "queue": "Seconds from arrival at the engine to the first step.",
    "inference": "Seconds from the first step to the end.",
    "prefill": "Seconds from the first step to the end of the prompt's computation.",
    "decode": "Seconds from the end of the prompt's computation to the end.",
}


M = TypeVar("M", Counter, Gauge, Histogram)


class ServerMetrics:
    """Implements `GatewayObserver`. `render` may be called at any time; counters never decrease.

    `finished_reason` of `vllm:request_success` is stop, length, abort or error, one a request. What the engine counts
    is per choice, and once more for what a new process computes again.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._families = _Families(self.registry)
        self._instances: dict[str, _InstanceMetrics] = {}
        # No adapters are served: the family exists, without a sample.
        self._families.labelled(
            Gauge,
            "vllm:lora_requests_info",
            "Running and waiting adapters.",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )

    def render(self) -> bytes:
        """Everything in Prometheus' text format, of media type `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    # ---- the gateway's observer

    def ready(self, info: Ready) -> None:
        """From now on there are samples of this instance; the buckets of sizes reach to its context."""
        self._instances[info.instance] = _InstanceMetrics(self._families, self._model_name, info)

    def arrived(self, instance: str, name: str, prompt_tokens: int) -> None:
        """A request came, for tokens or for an embedding."""
        self._instances[instance].requests.inc()

    def first_token(self, instance: str, name: str, seconds: float) -> None:
        """Seconds from the request's arrival at the gateway."""
        self._instances[instance].first_token.observe(seconds)

    def token_gap(self, instance: str, name: str, seconds: float) -> None:
        """Seconds since the token before."""
        self._instances[instance].gap.observe(seconds)

    def finished(
        self,
        instance: str,
        name: str,
        reason: str,
        params: SamplingParams,
        output: RequestOutput,
        explanation: Explanation | None,
        seconds: float,
    ) -> None:
        """A request ended. Without an explanation (an abort, an error) the times of its parts are not known."""
        self._instances[instance].finished(reason, params, output, explanation, seconds)

    def called(self, instance: str, calls: int) -> None:
        """An answer called tools."""
        self._instances[instance].tool_calls.inc(calls)

    def stepped(self, report: StepReport) -> None:
        """A step ran, or something ended between steps."""
        self._instances[report.instance].stepped(report)

    def restarted(self, instance: str) -> None:
        """A new process has replaced one that died."""
        self._instances[instance].restarted()


class _Families:
    """Metric families of one registry, each made when it is first asked for: instances share them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._made: dict[str, Any] = {}

    def labelled(self, kind: type[M], name: str, text: str, labels: Sequence[str] = LABELS, **options: Any) -> M:
        """The family of this name. `options` are the buckets of a histogram."""
        if name not in self._made:
            self._made[name] = kind(name, text, labels, registry=self._registry, **options)
        made: M = self._made[name]
        return made


class _InstanceMetrics:
    """The samples of one instance."""

    def __init__(self, families: _Families, model_name: str, info: Ready) -> None:
        self._families = families
        self._values = (model_name, info.instance)
        self._blocks = info.kv_blocks
        self._max_model_len = info.max_model_len
        self._seen: dict[str, float] = {}
        self._make_cache(info)
        self._make_engine()
        self._make_requests(_one_two_five(info.max_model_len))

    def finished(
        self,
        reason: str,
        params: SamplingParams,
        output: RequestOutput,
        explanation: Explanation | None,
        total_seconds: float,
    ) -> None:
        """`ServerMetrics.finished`."""
        if reason == "refused":
            self._refused.inc()
            return
        self._success.labels(*self._values, reason).inc()
        self._total.observe(total_seconds)
        self._choices.observe(params.n)
        prompt_tokens = len(output.prompt_token_ids)
        self._prompt_tokens.observe(prompt_tokens)
        self._max_tokens.observe(
            self._max_model_len - prompt_tokens if params.max_tokens is None else params.max_tokens
        )
        lengths = [len(choice.token_ids) for choice in output.outputs]
        self._generated_tokens.observe(sum(lengths))
        self._longest.observe(max(lengths, default=0))
        if explanation is not None:
            self._computed.observe(prompt_tokens - explanation.num_cached_tokens)
            if max(lengths) > 1:
                self._per_token.observe(explanation.decode_time / (max(lengths) - 1))
            parts = explanation.prefill_time, explanation.decode_time
            for kind, seconds in zip(REQUEST_TIMES, (explanation.queue_time, sum(parts), *parts)):
                self._times[kind].observe(seconds)
            self._preempted.observe(explanation.preemptions)
            self._resumed.inc(explanation.resumes)

    def stepped(self, report: StepReport) -> None:
        """`ServerMetrics.stepped`."""
        stats = report.stats
        self._running.set(stats["num_running"])
        self._waiting.set(stats["num_waiting"])
        grown = {field: self._growth(field, stats[field]) for field in GROWING}
        deferred = min(grown["prefix_waits"], stats["num_waiting"])
        self._deferred.set(deferred)
        self._held_up.set(stats["num_waiting"] - deferred)
        self._usage.set(stats["kv_usage"])
        self._waste.set(1 - stats["used_slots"] / stats["held_slots"] if stats["held_slots"] else 0)
        held, cached = stats["physical_blocks"], stats["cached_blocks"]
        self._held_blocks.set(held)
        self._cached_blocks.set(cached)
        self._free_blocks.set(self._blocks - held - cached)
        for counter, field in self._engine:
            counter.inc(grown[field])
        for place, count in enumerate(stats["accepted_at"]):
            self._accepted.labels(*self._values, str(place)).inc(self._growth(f"accepted_at[{place}]", count))
        self._aborts.inc(self._growth("abort", stats["finished"]["abort"]))
        if report.prefill_tokens or report.decode_tokens:
            self._prefill.inc(report.prefill_tokens)
            self._decode.inc(report.decode_tokens)
            self._step_time.observe(report.step_time)
        if report.prefill_tokens or grown["generated_tokens"]:
            self._step_tokens.observe(report.prefill_tokens + grown["generated_tokens"])

    def restarted(self) -> None:
        """The new process counts from 0, and nothing runs in it yet."""
        self._seen.clear()
        self._restarts.inc()
        for gauge in (self._running, self._waiting, self._held_up, self._deferred):
            gauge.set(0)
        for gauge in (self._usage, self._waste, self._held_blocks, self._cached_blocks):
            gauge.set(0)
        self._free_blocks.set(self._blocks)

    def _growth(self, field: str, now: float) -> float:
        """How much an engine's counter grew since the last report; one that shrank began again at 0."""
        before = self._seen.get(field, 0.0)
        self._seen[field] = now
        return now - before if now >= before else now

    # ---- making the samples

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._families.labelled(Gauge, name, text).labels(*self._values)

    def _counter(self, name: str, text: str) -> Counter:
        return self._families.labelled(Counter, name, text).labels(*self._values)

    def _histogram(self, name: str, text: str, edges: Sequence[float]) -> Histogram:
        return self._families.labelled(Histogram, name, text, buckets=edges).labels(*self._values)

    def _make_cache(self, info: Ready) -> None:
        description = self._families.labelled(
            Gauge,
            "vllm:cache_config_info",
            "The KV cache, described by labels; always 1.",
            (*LABELS, "block_size", "num_gpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency"),
        )
        sizes = info.block_size, info.kv_blocks, info.kv_tokens, round(info.kv_tokens / info.max_model_len, 2)
        description.labels(*self._values, *map(str, sizes)).set(1)
        blocks = self._families.labelled(
            Gauge,
            "headrace:kv_blocks",
            "KV blocks: held by requests, kept by the prefix cache only, or free.",
            (*LABELS, "state"),
        )
        self._held_blocks, self._cached_blocks, self._free_blocks = (
            blocks.labels(*self._values, state) for state in ("held", "cached", "free")
        )
        self._free_blocks.set(info.kv_blocks)
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks that requests hold; 1 is all.")
        self._waste = self._gauge("headrace:kv_waste_ratio", "Share of held token slots that are not filled.")

    def _make_engine(self) -> None:
        """What step reports feed, beside the cache."""
        self._running = self._gauge("vllm:num_requests_running", "Requests (choices) that hold KV blocks.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests (choices) that wait in the engine.")
        by_reason = self._families.labelled(
            Gauge,
            "vllm:num_requests_waiting_by_reason",
            "Those that wait: for a place or KV blocks (capacity), or for a prefix that another computes (deferred).",
            (*LABELS, "reason"),
        )
        self._held_up, self._deferred = (by_reason.labels(*self._values, why) for why in ("capacity", "deferred"))
        self._engine = [(self._counter(name, text), field) for name, (field, text) in ENGINE_COUNTERS.items()]
        self._accepted = self._families.labelled(
            Counter,
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that became output, by their position in the draft, from 0.",
            (*LABELS, "position"),
        )
        self._accepted.labels(*self._values, "0")
        self._step_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Prompt tokens computed and tokens generated in a step.", STEP_TOKENS
        )
        self._step_time = self._histogram("headrace:step_time_seconds", "Seconds of a step.", STEP)
        tokens = self._families.labelled(
            Counter, "headrace:step_tokens", "Tokens computed: of prompts, and all others.", (*LABELS, "kind")
        )
        self._prefill, self._decode = (tokens.labels(*self._values, kind) for kind in ("prefill", "decode"))
        self._aborts = self._counter("headrace:aborts", "Choices whose blocks were freed because the client left.")
        self._restarts = self._counter("headrace:restarts", "Instances that died and were replaced.")

    def _make_requests(self, sizes: Sequence[int]) -> None:
        """What is measured at the gateway, request by request. `sizes` are bucket edges, in tokens."""
        self.requests = self._counter("headrace:requests", "Requests that came, embeddings included.")
        self.tool_calls = self._counter("headrace:tool_calls", "Calls of tools in answers.")
        self._refused = self._counter("headrace:refused_requests", "Requests that the engine could never serve.")
        self._success = self._families.labelled(
            Counter, "vllm:request_success", "Requests that ended, by reason.", (*LABELS, "finished_reason")
        )
        for reason in REASONS:
            self._success.labels(*self._values, reason)
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Seconds from arrival at the gateway to the first token.", FIRST_TOKEN
        )
        self.gap = self._histogram(
            "vllm:inter_token_latency_seconds", "Seconds between tokens, at the gateway.", BETWEEN_TOKENS
        )
        self._total = self._histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from arrival at the gateway to the last token.", REQUEST
        )
        self._times = {
            kind: self._histogram(f"vllm:request_{kind}_time_seconds", text, REQUEST)
            for kind, text in REQUEST_TIMES.items()
        }
        self._prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._generated_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens a request generated, all choices.", sizes
        )
        self._choices = self._histogram("vllm:request_params_n", "A request's n.", CHOICES)
        self._max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "A request's max_tokens, or what its context leaves.", sizes
        )
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens", "Tokens of a request's longest choice.", sizes
        )
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a request that the cache did not have.", sizes
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Seconds a token of a request, after its first.",
            BETWEEN_TOKENS,
        )
        self._preempted = self._histogram(
            "vllm:request_num_preemptions", "Times that a request gave way and was computed again later.", PREEMPTIONS
        )
        self._resumed = self._counter("headrace:resumed_requests", "Times a request went on in a new instance.")


def _one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    edges = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
    return [edge for edge in edges if edge <= most]
