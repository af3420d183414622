"""The sampling defaults of a model: what its generation_config.json says of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import CheckpointError, ConfigError, RequestError
from headrace.model.folder import GENERATION
from headrace.typed import read_fields, read_json

__all__ = ["sampling_defaults"]


@dataclass(frozen=True, slots=True)
class _Generation:
    """The keys that are read."""

    do_sample: bool = True
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Fields of `SamplingParams` from a folder's generation_config.json; empty without one.

    Where `do_sample` is false, decoding is greedy, with the penalty. Raises `CheckpointError` naming the file and key.
    """
    file = folder / GENERATION
    if not file.exists():
        return {}
    try:
        given = {
            k: v for k, v in asdict(read_fields(_Generation, read_json(file), loose=True)).items() if v is not None
        }
        if not given.pop("do_sample"):
            given = {"temperature": 0.0, **{key: given[key] for key in given if key == "repetition_penalty"}}
        SamplingParams(**given)
    except (ConfigError, RequestError) as error:
        raise CheckpointError(
            f"{file}: {error}; correct the file, or leave it out with generation_config=none"
        ) from None
    return given
