"""`Sharded`: a model in training whose states are divided over its copies, at ZeRO's stage 0, 1, 2 or 3.

    stage   divided over the copies                   moved a micro-step, of Ψ elements
    0       nothing                                   2Ψ: gradients, all-reduced
    1       optimizer state (P_os)                    2Ψ: gradients reduce-scattered, weights all-gathered (once a step)
    2       and gradients (P_os+g)                    as 1
    3       and parameters (P_os+g+p)                 3Ψ: weights gathered forward and backward, gradients reduced

All four train to the same bits. Gradients are summed in one tree over the copies, AdamW works element by element, and
the norm adds sums of fixed chunks exactly: who keeps what is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from headrace.model.transformer import Part, Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.regions import Region
from headrace.zero.gradients import Gradients
from headrace.zero.layout import Segment, Unit, lay_out
from headrace.zero.messages import Messages
from headrace.zero.passage import passage
from headrace.zero.weights import Weights

__all__ = ["Sharded", "Slot"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A run of a unit's elements that this rank's optimizer works on. Both tensors stay the same ones."""

    unit: Unit
    start: int
    weights: Tensor
    gradients: Tensor


class Sharded:
    """One rank's part of a model and of its gradients. Made with `DeferredOps`, the model has its memory from here."""

    def __init__(
        self,
        model: Transformer,
        copies: RankGroup,
        stage: int = 0,
        bucket: int = 1 << 22,
        overlap: bool = True,
        each_micro_step: bool = True,
    ) -> None:
        """`bucket`: elements of a message. `overlap`: talk to the other copies while this one computes."""
        self._model, self._copies, self.stage = model, copies, stage
        self._parameters = list(model.parameters())
        self.units = lay_out(model.config, model.group, copies.size, bucket)
        self._messages = Messages(overlap and copies.size > 1)
        self.weights = Weights(self.units, self._parameters, copies, stage, self._messages)
        self.gradients = Gradients(self.units, self._parameters, copies, stage, self._messages, each_micro_step)
        own = self.gradients.own()
        self.slots = [Slot(unit, start, weights, own[unit.name, start]) for unit, start, weights in self.weights.own()]
        self._unit_of = self._units_of_parts()
        if stage == 3:
            self._install()

    # ---- weights, whole

    @contextmanager
    def filling(self) -> Iterator[None]:
        """While the model's first weights are written, part by part, as `Transformer.tensors` opens them."""
        self._model.opening = self._open_to_fill
        yield
        self._model.opening = self._open_to_read

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every weight is on every rank at once. All ranks enter and leave it together."""
        for i in range(len(self.units)):
            self.weights.enter(i)
        yield
        for i in range(len(self.units)):
            self.weights.leave(i)

    # ---- what is kept, by the checkpoint's names

    def regions(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[tuple[str, Region]]:
        """("kind/checkpoint name", region) of all that `tensors` hold: a flat one, or None, for each of `slots`."""
        first = self.stage > 0 or self._copies.rank == 0
        for segment, rows in self._rows(tensors):
            for place in segment.member.places:
                low, high = max(segment.first, place.rows[0]), min(segment.last, place.rows[1])
                if low < high:
                    part = rows[low - segment.first : high - segment.first, slice(*place.columns)]
                    yield (
                        f"{kind}/{place.name}",
                        Region(
                            part if len(place.shape) == 2 else part[:, 0],
                            (place.start[0] + low - place.rows[0], *place.start[1:]),
                            place.shape,
                            first and place.speaks,
                        ),
                    )

    def chunks(self, gradients: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
        """(gradients of a virtual shard's rows, elements of a chunk) of all that this rank's norm counts.

        `gradients`: a flat tensor for each of `slots`.
        """
        for segment, rows in self._rows(gradients):
            for place in filter(lambda place: place.speaks, segment.member.places):
                for first, last, left, right in place.shards:
                    low, high = max(segment.first, first), min(segment.last, last)
                    if low < high:
                        yield (
                            rows[low - segment.first : high - segment.first, left:right].reshape(-1),
                            place.chunk * (right - left),
                        )

    def memory(self) -> dict[str, int]:
        """Bytes of what it holds now, by what it is for."""
        return {
            "weights": sum(tensor.nbytes for tensor in self.weights.tensors()),
            "gathered weights": self.weights.buffer_bytes,
            "gradients": sum(tensor.nbytes for tensor in self.gradients.tensors()),
            "gradients on their way": self.gradients.buffer_bytes,
        }

    @property
    def waited(self) -> float:
        """Seconds for which this rank did not compute because of the other copies, since the beginning."""
        return self._messages.waited

    def close(self) -> None:
        """End its thread."""
        self._messages.close()

    # ---- inside

    def _rows(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[Segment, Tensor]]:
        """(which rows of which parameter, those rows [rows, width]) of a flat tensor, or None, for each of `slots`."""
        for slot, flat in zip(self.slots, tensors, strict=True):
            if flat is not None:
                for segment in slot.unit.segments(slot.start, slot.start + flat.numel()):
                    count, width = segment.last - segment.first, segment.member.width
                    yield segment, flat[segment.at : segment.at + count * width].view(count, width)

    def _units_of_parts(self) -> dict[int, int]:
        """By part's id: the unit of its matrices."""
        found = {}
        number = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        for _, part in self._model.parts():
            held = {number[id(parameter)] for parameter in part.parameters()}
            for i, unit in enumerate(self.units):
                if unit.matrices and held & {member.parameter for member in unit.members}:
                    found[id(part)] = i
        return found

    def _open_to_fill(self, part: Part) -> AbstractContextManager[None]:
        unit = self._unit_of.get(id(part))
        if unit is None or (part is self._model.lm_head and self._model.lm_head.tied):  # the embedding has filled it
            return nullcontext()
        return self.weights.filling(unit)

    @contextmanager
    def _open_to_read(self, part: Part) -> Iterator[None]:
        unit = self._unit_of.get(id(part))
        if unit is not None:
            self.weights.enter(unit)
        yield
        if unit is not None:
            self.weights.leave(unit)

    def _install(self) -> None:
        """Let every part have its unit when it is used. The order: embedding, blocks, head, and back."""
        model = self._model
        parts = [model.embed, *model.blocks, model.lm_head]
        units = [self._unit_of.get(id(part)) for part in parts]
        for i, (part, unit) in enumerate(zip(parts, units)):
            if unit is None:
                continue
            before = units[i - 1] if i > 1 else None
            after = units[i + 1] if i + 1 < len(units) else None
            part.forward = passage(  # type: ignore[method-assign]
                part.forward,
                self.weights,
                unit,
                before,
                after,
                backward=part is not model.embed,
            )
        if units[-1] is not None:  # the head's gradients are made on the way forward
            model.lm_head.loss = passage(  # type: ignore[method-assign]
                model.lm_head.loss,
                self.weights,
                units[-1],
                units[-2],
                None,
                backward=False,
            )
