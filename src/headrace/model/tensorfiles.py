"""The tensors of a checkpoint folder, memory-mapped from one safetensors file or the shards of an index."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.typed import read_json

__all__ = ["TensorFiles", "file_header", "write_tensors"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Tables in old checkpoints that every reader computes itself.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.self_attn\.masked_bias$")


class TensorFiles:
    """Name → tensor over a checkpoint's files, which stay mapped while this object lives.

    Opening reads the headers only. A missing, truncated or corrupt file raises `CheckpointError` naming it.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        if (folder / SINGLE).exists():
            path = folder / SINGLE
            self._where = dict.fromkeys(self._open(path).keys(), path)
        elif (folder / INDEX).exists():
            self._read_index(folder)
        else:
            hint = " (pickled weights are not read)" if list(folder.glob("pytorch_model*.bin")) else ""
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")

    def _read_index(self, folder: Path) -> None:
        index = folder / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index} places {name} in {file!r}, which is not a file name")
            path = folder / file
            if path not in self._files and not path.exists():
                raise CheckpointError(f"{path} is missing: {INDEX} places {name} in it")
            if name not in set(self._open(path).keys()):
                raise CheckpointError(f"{path} lacks the tensor {name} that {INDEX} places in it")
            self._where[name] = path

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safetensors.safe_open(path, framework="pt", device="cpu")
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is truncated or corrupt: {_one_line(error)}") from error
        return self._files[path]

    def names(self) -> set[str]:
        """The names of all tensors but those in `IGNORED`."""
        return {name for name in self._where if not IGNORED.search(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header. Raises `CheckpointError` for one outside `DTYPES`."""
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise CheckpointError(f"{name} in {self._where[name]} is {code}, not one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def tensor(self, name: str) -> Tensor:
        """A tensor over the mapped file: pages are read when they are touched."""
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)


def file_header(places: Mapping[str, tuple[torch.dtype, Sequence[int], int]]) -> bytes:
    """The header of a safetensors file: by name, (dtype, shape, offset of its bytes after the header)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, at) in places.items():
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + math.prod(shape) * dtype.itemsize],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write one safetensors file; it gets its name only when it is complete.

    `layout`: (dtype, shape) of each of `tensors`, which are written one after another in any order, so they need not
    be in memory together, as safetensors' own writer requires. Raises `OSError`.
    """
    places, at = {}, 0
    for name, (dtype, shape) in sorted(
        layout.items(), key=lambda one: -one[1][0].itemsize
    ):  # aligned to its element size
        places[name] = dtype, shape, at
        at += math.prod(shape) * dtype.itemsize
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a writer that was stopped, perhaps with another mode
    header = file_header(places)
    with partial.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            dtype, shape, at = places.pop(name)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
            file.seek(len(header) + at)
            data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            file.write(memoryview(data))
    if places:
        raise ValueError(f"{min(places)} was not given")
    os.replace(partial, path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
