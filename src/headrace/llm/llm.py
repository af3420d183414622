"""`LLM`: an engine in this process, for scripts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from headrace.engine.run.ranks import Ranks
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError, renamed_fields
from headrace.kernels.ops import Ops
from headrace.llm.chat import ChatOutput, ToolRequest, chat_output, message_shape, shaped_params
from headrace.llm.defaults import sampling_defaults
from headrace.llm.frontend import Frontend, Prompt, WeightSource
from headrace.llm.options import EngineOptions
from headrace.llm.outputs import RequestOutput
from headrace.llm.records import ResumeRecord
from headrace.model.folder import resolve
from headrace.model.transformer import Transformer
from headrace.text.messages import read_tools
from headrace.text.template_process import TemplateProcess
from headrace.text.tokenizer import Tokenizer

__all__ = ["LLM"]


class LLM:
    """A model, ready to generate.

    >>> llm = LLM("path/or/hub-id", threads=2, kv_cache_memory="1GiB")   # doctest: +SKIP
    >>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=50))[0].outputs[0].text   # doctest: +SKIP

    `options` are the fields of `EngineOptions`. Raises a `HeadraceError` with the remedy if the checkpoint or an
    option is wrong. One thread at a time may use it; `AsyncLLM` is for many callers.
    """

    def __init__(
        self, model: str | Path, *, progress: Callable[[int, int, str], None] | None = None, **options: Any
    ) -> None:
        folder = resolve(model)
        settings = EngineOptions(**options)
        defaults = sampling_defaults(folder) if settings.generation_config == "auto" else {}
        self._start(Frontend.from_folder(folder, settings, progress), defaults, folder)

    @classmethod
    def from_model(
        cls, model: Transformer, tokenizer: Tokenizer, ops: Ops, ranks: Ranks | None = None, **options: Any
    ) -> LLM:
        """An engine around a model in memory, whose weights are not copied.

        `ranks` are the processes that hold its other shards.
        """
        llm = cls.__new__(cls)
        llm._start(Frontend(model, tokenizer, ops, EngineOptions(**options), ranks), {})
        return llm

    def _start(self, frontend: Frontend, defaults: dict[str, Any], folder: Path | None = None) -> None:
        self.folder = folder
        """Of the checkpoint; None for a model from memory."""
        self.frontend = frontend
        self.tokenizer = frontend.tokenizer
        self.fingerprint = frontend.fingerprint
        self._defaults = defaults
        self._templates = TemplateProcess()

    def update_weights(self, source: WeightSource, version: int | None = None) -> int:
        """Load other weights of the same shape into the running model; returns their version (None: the next one).

        `source` is a checkpoint folder or hub id, a model (a trainer's `model`), or tensors by checkpoint name. Cached
        prefixes of the old weights are dropped; running requests compute their known tokens again, and continue.
        Raises `CheckpointError`, with nothing changed, if a tensor does not fit.
        """
        return self.frontend.update_weights(source, version)

    def close(self) -> None:
        """End the processes of the chat template and of tensor parallelism. No step can run afterwards."""
        self._templates.close()
        self.frontend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def default_sampling_params(self) -> dict[str, Any]:
        """The sampling parameters in the model's generation_config.json."""
        return dict(self._defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        priority: Sequence[int] | int = 0,
    ) -> list[RequestOutput]:
        """Continue one prompt or many in one batch; outputs are in the order of the prompts.

        A prompt is text, token ids, or a mapping with `prompt` or `prompt_token_ids`. `params` is one for all, or one
        for each; None means the model's defaults. Raises `RequestError` if a prompt is refused; then none runs.
        """
        many = cast(list[Prompt], [prompts] if _is_one(prompts) else list(prompts))
        each = (
            list(params) if isinstance(params, Sequence) else [params or SamplingParams(**self._defaults)] * len(many)
        )
        ranks = list(priority) if isinstance(priority, Sequence) else [priority] * len(many)
        for what, values in (("params", each), ("priority", ranks)):
            if len(values) != len(many):
                raise RequestError(f"{len(values)} {what} for {len(many)} prompts: give one for all, or one each", what)

        def add(i: int) -> str:
            with renamed_fields({} if _is_one(prompts) else {"prompt": f"prompts[{i}]"}):
                return self.frontend.add(many[i], each[i], priority=ranks[i])

        return self._run(add, len(many))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[RequestOutput, None, None]:
        """Continue one prompt; yields the output after every step that changed it."""
        name = self.frontend.add(prompt, params or SamplingParams(**self._defaults))
        try:
            while self.frontend.has_work:
                for group in self.frontend.step():
                    if group.name == name:
                        yield group.output.snapshot()
        finally:
            self.frontend.abort(name)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool = True,
    ) -> ChatOutput:
        """Answer one conversation, formatted by the model's chat template.

        `tools`, `tool_choice` and `parallel_tool_calls` are as in OpenAI's API: a call that the answer makes is always
        valid. Each of the output's `messages` has a choice's content, reasoning and calls.
        """
        template = self.tokenizer.chat_template
        asked = ToolRequest(read_tools(tools), tool_choice, parallel_tool_calls)
        shape = message_shape("\n".join(template.sources.values()), asked)
        prompt = self.chat_prompt(messages, asked.tools)
        given = params or SamplingParams(**self._defaults)
        shape, given = shaped_params(shape, prompt["prompt"], given, self.tokenizer)
        with renamed_fields({"constraint": "tools"} if shape.allowed else {}):
            return chat_output(self.generate([prompt], given)[0], shape)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The prompt of a conversation. The template adds the special tokens.

        Messages have the forms that `read_messages` takes. The template runs in a process of its own, which is stopped
        after two seconds. Raises `RequestError` where the messages do not suit it, `CheckpointError` at its limits.
        """
        text = self._templates.render(self.tokenizer.chat_template, messages, tools=tools)
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def resume(self, records: Sequence[ResumeRecord]) -> list[RequestOutput]:
        """Continue from records of this or another engine of the same fingerprint and weights, with equal tokens."""
        return self._run(lambda i: self.frontend.resume(records[i]), len(records))

    def _run(self, add: Callable[[int], str], count: int) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        names: list[str] = []
        try:
            names += (add(i) for i in range(count))
            while len(outputs) < count and self.frontend.has_work:
                outputs |= {g.name: g.output for g in self.frontend.step() if g.output.finished}
        finally:
            for name in names:
                self.frontend.abort(name)
        return [outputs[name] for name in names]


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int))
