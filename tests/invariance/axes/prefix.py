"""What the cache has of a prompt: nothing, all of it, or all of it while it is being computed."""

from headrace.cache.manager import CacheManager
from headrace.engine.engine import Engine
from headrace.engine.schedule.request import Request
from invariance.axis import Axis, Mutant, Setup
from invariance.driving import drive, numbered


def setup(setup: Setup, prefix: str) -> None:
    setup.options["prefix_caching"] = prefix != "cold"


def prepare(engine: Engine, requests: list[Request], prefix: str) -> None:
    if prefix == "warm":
        drive(engine, [[numbered(1000 + item.request_id, item) for item in requests]])


def with_twins(requests: list[Request], prefix: str) -> list[Request]:
    if prefix != "in-flight":
        return requests
    return [one for item in requests for one in (numbered(2000 + item.request_id, item), item)]


def shares_the_wrong_blocks(patch):
    """A prefix cache that hands out the right blocks in the wrong order."""
    right = CacheManager.adopt
    patch.setattr(CacheManager, "adopt", lambda self, kv, path: right(self, kv, path[::-1]))


AXIS = Axis(
    values=("cold", "warm", "in-flight"),
    setup=setup,
    prepare=prepare,
    requests=with_twins,
    mutants=(
        Mutant(shares_the_wrong_blocks, load=2, prefix="warm"),
        Mutant(shares_the_wrong_blocks, load=2, prefix="in-flight"),
    ),
)
