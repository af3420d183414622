"""Frames: messages from rank 0 to the other ranks, each a header in JSON and arrays.

u32 length of the header │ header │ arrays, one after another
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import fields
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from headrace.cache.manager import BlockMoves
from headrace.engine.run.shard import Inputs
from headrace.kernels.ops import AttentionMeta

__all__ = ["frame", "read_frame", "read_step", "step_frame"]

_LENGTH = struct.Struct("<I")
_META = [f.name for f in fields(AttentionMeta) if f.name not in ("max_query", "max_context")]


def frame(kind: str, values: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """Encode one message. `values` must be serializable as JSON."""
    arrays = {} if arrays is None else arrays
    shapes = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    header = json.dumps({"kind": kind, "values": values or {}, "arrays": shapes}).encode()
    return b"".join((_LENGTH.pack(len(header)), header, *(np.ascontiguousarray(a).tobytes() for a in arrays.values())))


def read_frame(stream: IO[bytes]) -> tuple[str, dict[str, Any], dict[str, np.ndarray]] | None:
    """The next message's kind, values and arrays; None where the stream ends, even inside a message."""
    start = stream.read(_LENGTH.size)
    if len(start) < _LENGTH.size:
        return None
    header = stream.read(_LENGTH.unpack(start)[0])
    try:
        message = json.loads(header)
    except ValueError:
        return None
    arrays = {}
    for name, dtype, shape in message["arrays"]:
        kind = np.dtype(dtype)
        data = stream.read(kind.itemsize * int(np.prod(shape)))
        if len(data) < kind.itemsize * int(np.prod(shape)):
            return None
        arrays[name] = np.frombuffer(bytearray(data), kind).reshape(shape)
    return message["kind"], message["values"], arrays


def step_frame(moves: BlockMoves, inputs: Inputs | None) -> bytes:
    """Encode a step: its block moves and, where it has slices, the model's inputs."""
    values: dict[str, Any] = {"moves": [moves.swap_out, moves.swap_in, moves.copies]}
    if inputs is None:
        return frame("step", values)
    meta = inputs.meta
    values |= {"max_query": meta.max_query, "max_context": meta.max_context}
    tensors = {
        "ids_T": inputs.ids_T,
        "positions_T": inputs.positions_T,
        "rows_R": inputs.rows_R,
        **{name: getattr(meta, name) for name in _META},
    }
    return frame("step", values, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})


def read_step(
    values: Mapping[str, Any], arrays: Mapping[str, np.ndarray], device: torch.device
) -> tuple[BlockMoves, Inputs | None]:
    """Decode a `step_frame`, with tensors on `device`."""
    moves = BlockMoves(*([(int(a), int(b)) for a, b in pairs] for pairs in values["moves"]))
    if not arrays:
        return moves, None
    tensors: dict[str, Tensor] = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    meta = AttentionMeta(
        **{name: tensors[name] for name in _META}, max_query=values["max_query"], max_context=values["max_context"]
    )
    return moves, Inputs(tensors["ids_T"], tensors["positions_T"], meta, tensors["rows_R"])
