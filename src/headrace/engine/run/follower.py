"""`Follower`: a rank above 0, which executes rank 0's frames in its own process or inside a trainer."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from headrace.engine.run.frames import frame, read_frame, read_step
from headrace.engine.run.ranks import Ranks
from headrace.engine.run.shard import ModelShard, kv_store
from headrace.kernels.ops import Ops
from headrace.model.huggingface import load_weights
from headrace.model.layers import weight_dtype
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup

__all__ = ["Follower", "GroupRanks", "follow"]


class Follower:
    """One rank's part of the model and, once a frame has given its size, of the KV cache."""

    def __init__(self, model: Transformer, ops: Ops, ready: Callable[[], None] = lambda: None) -> None:
        """`ready` is called when the KV cache is allocated."""
        self._model, self._ops, self._ready = model, ops, ready
        self._shard: ModelShard | None = None

    def execute(self, kind: str, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> bool:
        """Execute a frame; returns whether further frames may follow."""
        model, ops = self._model, self._ops
        if kind == "cache":
            dtype = getattr(torch, values["cache_dtype"])
            ops.warm_up(weight_dtype(model.config), dtype)
            store = kv_store(model, values["num_blocks"], values["block_size"], dtype, ops)
            self._shard = ModelShard(model, ops, store, values["host_slots"])
            self._ready()
        elif kind == "weights":
            load_weights(model, values["folder"])
            model.group.barrier()
        elif kind == "stop":
            return False
        else:
            assert self._shard is not None
            if kind == "step":
                moves, inputs = read_step(values, arrays, ops.device)
                self._shard.move(moves)
                if inputs is not None:
                    self._shard.logits(inputs)
            elif kind == "hidden":
                self._shard.hidden(values["ids"])
        return True


class GroupRanks(Ranks):
    """A trainer's ranks, which exist already: frames go through their group to the ranks that run `follow`."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(group.size)
        self.group = group

    def initialize_cache(self, **values: Any) -> None:
        self.send(frame("cache", values))

    def send(self, message: bytes) -> None:
        self.group.broadcast(message)

    def close(self) -> None:
        """Make `follow` return on the other ranks; the group stays open."""
        self.send(frame("stop"))


def follow(model: Transformer, ops: Ops) -> None:
    """Execute the frames of rank 0's `GroupRanks` until it closes them."""
    follower = Follower(model, ops)
    while (message := read_frame(io.BytesIO(model.group.broadcast(None)))) is not None and follower.execute(*message):
        pass
