"""The messages between a gateway and an instance: msgpack, one struct a message, no pickle.

Floats travel as 64-bit floats, so log-probabilities keep their bits.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.cache.key import CacheKey
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.llm.outputs import RequestOutput
from headrace.llm.records import ResumeRecord

__all__ = [
    "COMMANDS",
    "EVENTS",
    "Abort",
    "Accepted",
    "Add",
    "Command",
    "Delta",
    "Embed",
    "Embedding",
    "EngineEvent",
    "Event",
    "EventBatch",
    "Explanation",
    "Failed",
    "Inspect",
    "InstalledWeights",
    "KernelProgress",
    "Ready",
    "Refused",
    "Resume",
    "StepReport",
    "Stop",
    "Tree",
    "UpdateWeights",
    "WeightsUpdated",
    "decode_command",
    "decode_event",
    "encode",
]

COMMANDS, EVENTS = "commands", "events"
"""File names of the two sockets, in a temporary directory that the gateway makes."""


class _Message(msgspec.Struct, tag=True, omit_defaults=True):
    pass


# ---- gateway → instance ----------------------------------------------------------------------------------------


class Add(_Message):
    """A new request; `params` has a seed."""

    name: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_key: CacheKey = CacheKey()


class Resume(_Message):
    """Continue a request that another instance had begun."""

    record: ResumeRecord

    @property
    def name(self) -> str:
        """The request's name."""
        return self.record.output.request_id


class Abort(_Message):
    """End a request or an embedding: its blocks are freed before the next step."""

    name: str


class Embed(_Message):
    """Mean-pooled hidden states of a prompt."""

    name: str
    prompt_token_ids: list[int]


class Inspect(_Message):
    """Ask for a `Tree`."""

    name: str
    max_nodes: int = 500


class UpdateWeights(_Message):
    """Load a folder's weights into the running model, as `version` (None: the next one)."""

    name: str
    folder: str
    version: int | None = None


class Stop(_Message):
    """End the process after the current step."""


Command = Add | Resume | Abort | Embed | Inspect | UpdateWeights | Stop


# ---- instance → gateway ----------------------------------------------------------------------------------------


class InstalledWeights(_Message):
    """Weights that were loaded into a running model. A restarted process needs them to give the same tokens."""

    folder: str
    version: int
    files: list[tuple[str, int, int]]
    """Name, bytes and modification time (ns) of every weight file, to detect that one has changed."""


class Accepted(_Message):
    """An `Add` or `Resume` was queued."""

    name: str


class Explanation(_Message):
    """Where a request's time went: seconds by a monotonic clock, tokens and counts.

    For a resumed request, all but `resumes` is of the last process.
    """

    queue_time: float = 0.0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    num_cached_tokens: int = 0
    chunks: int = 0
    """Steps that computed prompt tokens."""
    preemptions: int = 0
    compile_time: float = 0.0
    """Before all these: how long it waited for its grammar."""
    forced_tokens: int = 0
    """Output tokens that a constraint left no choice about."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafts that were computed, and those that became output."""
    batch_sizes: list[int] = []
    """Requests in the batch, for each step of this request (the last 256)."""
    gammas: list[int] = []
    """γ in each of these steps: the drafts of the choice that had most. Empty if none of them had any."""
    resumes: int = 0
    """Times the request was resumed in another process; set by the gateway."""


class Delta(_Message):
    """New output of one request, for `RequestOutput.extend`."""

    output: RequestOutput
    explanation: Explanation | None = None
    """With the last delta."""

    @property
    def name(self) -> str:
        """The request's name."""
        return self.output.request_id


class Refused(_Message):
    """A command that this instance can never execute; the rest is a `RequestError`, by its parts."""

    name: str
    message: str
    param: str | None = None
    code: str | None = None
    template: str | None = None
    values: tuple[str, ...] = ()

    @classmethod
    def by(cls, name: str, error: RequestError) -> Refused:
        """The refusal of a command for an error."""
        return cls(name, str(error), error.param, error.code, error.template, error.values)

    def error(self) -> RequestError:
        """The error, with the engine's names of fields."""
        if self.template is None or self.param is None:
            return RequestError(self.message, self.param, self.code)
        return RequestError.about(self.param, self.template, *self.values, code=self.code)


class Embedding(_Message):
    """The answer to `Embed`."""

    name: str
    vector: list[float]
    weights_version: int = 0


class WeightsUpdated(_Message):
    """The answer to `UpdateWeights`: every later step uses these weights. After a `Refused`, nothing has changed."""

    name: str
    weights: InstalledWeights


class StepReport(_Message):
    """After every step of `instance`, and after an abort: `SchedulerStats` and `MaskStats`, and the batch that ran.

    Counters start at 0 in every process. `decode_tokens` are all tokens outside prompts, including those computed again
    after a preemption. Seconds.
    """

    instance: str
    stats: dict[str, Any]
    prefill_tokens: int = 0
    decode_tokens: int = 0
    step_time: float = 0.0


class Tree(_Message):
    """The answer to `Inspect`, the radix tree.

    Rows of (id, parent id or −1, tokens of the edge, requests that hold it, beginning of the edge's text).
    """

    name: str
    nodes: list[tuple[int, int, int, int, str]]
    complete: bool = True


class KernelProgress(_Message):
    """`done` of `total` kernels are compiled or loaded from disk; `what` is the current one."""

    done: int
    total: int
    what: str


class Ready(_Message):
    """The model is loaded and its kernels are compiled."""

    instance: str
    """Its name."""
    pid: int
    fingerprint: str
    max_model_len: int
    vocab_size: int
    kv_tokens: int
    kv_blocks: int
    block_size: int
    default_sampling_params: dict[str, Any]
    startup_seconds: float
    hidden_size: int = 0
    folder: str = ""
    """Of the checkpoint."""
    weights_version: int = 0


class Failed(_Message):
    """The instance cannot start or continue; `bad_input` if the user's input is the cause."""

    message: str
    bad_input: bool = False


EngineEvent = Accepted | Delta | Refused | Embedding | StepReport | Tree | WeightsUpdated
"""An event of a step, or of the commands before it."""


class EventBatch(_Message):
    """All events of one step in one message: the cost is that of one stream. Never empty; the report is last."""

    events: list[EngineEvent]


Event = EventBatch | KernelProgress | Ready | Failed

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_events = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """A gateway's message; raises `msgspec.DecodeError` (a ValueError) if `data` is not one."""
    command: Command = _commands.decode(data)
    return command


def decode_event(data: bytes) -> Event:
    """An instance's message; raises `msgspec.DecodeError` (a ValueError) if `data` is not one."""
    event: Event = _events.decode(data)
    return event
