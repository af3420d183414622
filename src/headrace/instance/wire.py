"""The messages between a gateway and an instance: msgpack, one struct a message, nothing that runs code.

Floats travel as 64-bit floats, so a log-probability arrives with the bits it left with.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.cache.key import CacheKey
from headrace.engine.schedule.sampling import SamplingParams
from headrace.llm.records import ResumeRecord

__all__ = [
    "COMMANDS",
    "EVENTS",
    "Abort",
    "Accepted",
    "Add",
    "Batch",
    "ChoiceDelta",
    "Command",
    "Delta",
    "Embed",
    "Embedding",
    "Event",
    "Explanation",
    "Failed",
    "Inspect",
    "News",
    "Progress",
    "Ready",
    "Refused",
    "Resume",
    "StepReport",
    "Stop",
    "TokenEntry",
    "Tree",
    "Update",
    "Updated",
    "Weights",
    "decode_command",
    "decode_event",
    "encode",
]

COMMANDS, EVENTS = "commands", "events"
"""File names of the two sockets, in a directory that is the gateway's own."""


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
    """A request that another instance had begun."""

    record: ResumeRecord

    @property
    def name(self) -> str:
        """Of the request."""
        return self.record.output.request_id


class Abort(_Message):
    """The client has left: free the blocks before the next step."""

    name: str


class Embed(_Message):
    """Mean-pooled hidden states of a prompt."""

    name: str
    prompt_token_ids: list[int]


class Inspect(_Message):
    """Ask for one `Tree`."""

    max_nodes: int = 500


class Update(_Message):
    """Put a folder's weights into the running model, as `version` (None: the next one)."""

    name: str
    folder: str
    version: int | None = None


class Stop(_Message):
    """End the process after the step that runs."""


Command = Add | Resume | Abort | Embed | Inspect | Update | Stop


# ---- instance → gateway ----------------------------------------------------------------------------------------


class Weights(_Message):
    """Weights that were put in: what another instance must have, to go on with the same tokens."""

    folder: str
    version: int
    files: list[tuple[str, int, int]]
    """Name, bytes and time of change of every file that holds them, by which it is seen that they are the same."""


class Accepted(_Message):
    """An `Add` or `Resume` was queued."""

    name: str


class TokenEntry(msgspec.Struct, array_like=True, frozen=True):
    """A token with its raw log-probability, its rank from 1 and its text."""

    token_id: int
    logprob: float
    rank: int
    decoded_token: str


class ChoiceDelta(msgspec.Struct, array_like=True, frozen=True):
    """What a step brought to one choice. `logprobs` has a table for every new token, its own entry first."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[TokenEntry]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Explanation(_Message):
    """Why a request took the time it took: seconds by a monotonic clock, tokens and counts.

    Of a request that went on in another instance, all but `resumes` is of the last one.
    """

    queue_time: float = 0.0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    num_cached_tokens: int = 0
    chunks: int = 0
    """Steps that computed prompt tokens."""
    preemptions: int = 0
    batch_sizes: list[int] = []
    """Requests in the batch, for each step this one was in (of long requests, the last 256)."""
    resumes: int = 0
    """Times it went on in another instance process; the gateway counts."""


class Delta(_Message):
    """News of one request. `prompt_logprobs` are the tables that are new, None for the first token."""

    name: str
    choices: list[ChoiceDelta]
    prompt_logprobs: list[list[TokenEntry] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False
    explanation: Explanation | None = None
    """With the last delta."""
    weights_version: int = 0
    """Of the weights that gave it."""


class Refused(_Message):
    """A request that this instance can never serve, with the numbers."""

    name: str
    message: str
    param: str | None = None


class Embedding(_Message):
    """The answer to `Embed`."""

    name: str
    vector: list[float]
    weights_version: int = 0


class Updated(_Message):
    """The answer to `Update`: every later step is of these weights. A `Refused` says that nothing has changed."""

    name: str
    weights: Weights


class StepReport(_Message):
    """After every step, and after an abort: `SchedulerStats` as a dict, and the batch that ran.

    Counters begin at 0 in every new instance. `decode_tokens` are all that are no prompt's, so those that are
    computed again after a preemption too. Seconds.
    """

    stats: dict[str, Any]
    prefill_tokens: int = 0
    decode_tokens: int = 0
    step_time: float = 0.0


class Tree(_Message):
    """The radix tree: rows of (id, parent id or −1, tokens of the edge, requests that hold it, text's beginning)."""

    nodes: list[tuple[int, int, int, int, str]]
    complete: bool = True


class Progress(_Message):
    """Kernels are being compiled, or loaded from disk: `done` of `total`, and the one it is at."""

    done: int
    total: int
    what: str


class Ready(_Message):
    """The model is loaded and kernels are warm."""

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
    """Where the checkpoint lies."""
    weights_version: int = 0


class Failed(_Message):
    """The instance cannot start or go on; `bad_input` if the user can mend it."""

    message: str
    bad_input: bool = False


News = Accepted | Delta | Refused | Embedding | StepReport | Tree | Updated
"""What a step, or the commands before it, can bring."""


class Batch(_Message):
    """All news of one step in one message, so that 32 streams cost what one does. Never empty; the report is last."""

    news: list[News]


Event = Batch | Progress | Ready | Failed

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_events = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """A gateway's message; `msgspec.DecodeError` (a ValueError) if it is none."""
    return _commands.decode(data)


def decode_event(data: bytes) -> Event:
    """An instance's message; `msgspec.DecodeError` (a ValueError) if it is none."""
    return _events.decode(data)
