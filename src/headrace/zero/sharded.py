"""`Sharded`: a model in training whose states are divided over its copies, at ZeRO's stage 0, 1, 2 or 3.

    stage   divided over the copies                   moved a micro-step, of Ψ elements
    0       nothing                                   2Ψ: gradients, all-reduced
    1       optimizer state (P_os)                    2Ψ: gradients reduce-scattered, weights all-gathered (once a step)
    2       and gradients (P_os+g)                    as 1
    3       and parameters (P_os+g+p)                 3Ψ: weights gathered forward and backward, gradients reduced

All four train to the same bits: gradients are summed in one tree over the copies, AdamW works element by element, and
the norm adds sums of fixed chunks exactly. None of these depends on which rank keeps an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from headrace.model.transformer import Part, Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.regions import Region
from headrace.zero.collectives import CollectiveQueue
from headrace.zero.gathering import gathering
from headrace.zero.gradients import Gradients
from headrace.zero.layout import RowRange, Unit, lay_out
from headrace.zero.weights import Weights

__all__ = ["Sharded", "Slot"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A range of a unit's elements that this rank's optimizer updates. Both tensors keep their memory."""

    unit: Unit
    start: int
    weights: Tensor
    gradients: Tensor


class Sharded:
    """One rank's part of a model and of its gradients. It allocates the memory of a model made with `DeferredOps`."""

    def __init__(
        self,
        model: Transformer,
        copies: RankGroup,
        stage: int = 0,
        bucket: int = 1 << 22,
        overlap: bool = True,
        each_micro_step: bool = True,
    ) -> None:
        """`bucket`: elements of a message. `overlap`: run collectives while this rank computes."""
        self._model, self._copies, self.stage = model, copies, stage
        self._parameters = list(model.parameters())
        self.units = lay_out(model.config, model.group, copies.size, bucket)
        self._queue = CollectiveQueue(overlap and copies.size > 1)
        self.weights = Weights(self.units, self._parameters, copies, stage, self._queue)
        self.gradients = Gradients(self.units, self._parameters, copies, stage, self._queue, each_micro_step)
        own = self.gradients.own()
        self.slots = [Slot(unit, start, weights, own[unit.name, start]) for unit, start, weights in self.weights.own()]
        self._unit_of = self._units_of_parts()
        if stage == 3:
            self._install()

    # ---- weights, whole

    @contextmanager
    def filling(self) -> Iterator[None]:
        """The context in which the model's first weights are written, part by part, by `Transformer.tensors`."""
        self._model.opening = self._open_to_fill
        yield
        self._model.opening = self._open_to_read

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The context in which every rank holds all weights. All ranks enter and leave it together."""
        for i in range(len(self.units)):
            self.weights.gather(i)
        yield
        for i in range(len(self.units)):
            self.weights.release(i)

    # ---- what is kept, by the checkpoint's names

    def regions(self, kind: str, tensors: Sequence[Tensor | None]) -> Iterator[tuple[str, Region]]:
        """("kind/checkpoint name", region) of everything in `tensors`: a flat tensor, or None, for each of `slots`."""
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
                            first and place.writes,
                        ),
                    )

    def chunks(self, gradients: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
        """(gradients of a virtual shard's rows, elements of a chunk) that this rank adds to the norm.

        `gradients`: a flat tensor for each of `slots`.
        """
        for segment, rows in self._rows(gradients):
            for place in filter(lambda place: place.writes, segment.member.places):
                for first, last, left, right in place.shards:
                    low, high = max(segment.first, first), min(segment.last, last)
                    if low < high:
                        yield (
                            rows[low - segment.first : high - segment.first, left:right].reshape(-1),
                            place.chunk * (right - left),
                        )

    def memory(self) -> dict[str, int]:
        """Bytes held now, by purpose."""
        return {
            "weights": sum(tensor.nbytes for tensor in self.weights.tensors()),
            "gathered weights": self.weights.buffer_bytes,
            "gradients": sum(tensor.nbytes for tensor in self.gradients.tensors()),
            "gradient buckets": self.gradients.buffer_bytes,
        }

    @property
    def waited(self) -> float:
        """Seconds that this rank has waited for collectives with the other copies."""
        return self._queue.waited

    def close(self) -> None:
        """End the thread of collectives."""
        self._queue.close()

    # ---- inside

    def _rows(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[RowRange, Tensor]]:
        """(which rows of which parameter, those rows [rows, width]) of a flat tensor, or None, for each of `slots`."""
        for slot, flat in zip(self.slots, tensors, strict=True):
            if flat is not None:
                for segment in slot.unit.segments(slot.start, slot.start + flat.numel()):
                    count, width = segment.last - segment.first, segment.member.width
                    yield segment, flat[segment.at : segment.at + count * width].view(count, width)

    def _units_of_parts(self) -> dict[int, int]:
        """{id of a part: index of the unit of its matrices}."""
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
            self.weights.gather(unit)
        yield
        if unit is not None:
            self.weights.release(unit)

    def _install(self) -> None:
        """Wrap every part's forward in `gathering`. The order of use: embedding, blocks, head, and back."""
        model = self._model
        parts = [model.embed, *model.blocks, model.lm_head]
        units = [self._unit_of.get(id(part)) for part in parts]
        for i, (part, unit) in enumerate(zip(parts, units)):
            if unit is None:
                continue
            before = units[i - 1] if i > 1 else None
            after = units[i + 1] if i + 1 < len(units) else None
            part.forward = gathering(
                part.forward,
                self.weights,
                unit,
                before,
                after,
                backward=part is not model.embed,
            )
        if units[-1] is not None:  # the head computes its gradients in forward
            model.lm_head.loss = gathering(  # type: ignore[method-assign]
                model.lm_head.loss,
                self.weights,
                units[-1],
                units[-2],
                None,
                backward=False,
            )
