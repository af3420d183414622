"""Requests for the tests of proposers, and the ways in which tokens reach them."""

from headrace.cache.key import CacheKey
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams


def request_of(request_id, prompt, output=(), *, salt=None, version=0, parent_id=None, **params):
    key = CacheKey(version, None, salt)
    return Request(
        request_id, prompt, SamplingParams(**params), parent_id=parent_id, cache_key=key, output_token_ids=output
    )


def generate(proposer, request, tokens, every=1):
    """`tokens` become known one by one; the proposer learns after `every` of them."""
    for i, token in enumerate(tokens):
        request.token_ids.append(token)
        if (i + 1) % every == 0:
            proposer.learn(request)


def say(proposer, request_id, prompt, tokens, **options):
    """A whole request: its prompt is learned, then its output, and it ends."""
    request = request_of(request_id, prompt, **options)
    proposer.learn(request)
    generate(proposer, request, tokens)
    proposer.finish(request)
