"""Whether a request begins in one process and ends in another."""

from headrace.engine.schedule.request import Request
from invariance.axis import Axis, Mutant
from invariance.driving import Trace

STEPS = 6
"""Steps before the requests move."""


def play(run, _) -> dict[int, Trace]:
    known = {item.request_id: len(item.token_ids) for item in run.requests}
    before = run.drive(STEPS)
    records = {item.request_id: item.resume_record() for item in run.requests}
    after = run.elsewhere(records, resumed=False)
    traces = {}
    for number, record in records.items():
        tokens = record["token_ids"]
        logits = {p: row for p, row in before[number].logits.items() if p < len(tokens)}
        traces[number] = Trace(tokens[known[number] :] + after[number].tokens, {**logits, **after[number].logits})
    return traces


def forgets_what_is_output(patch):
    """A record that counts the output so far as prompt, so that penalties no longer see it."""
    right = Request.from_record.__func__

    def from_record(cls, request_id, record):
        done = len(record["token_ids"]) - record["num_prompt_tokens"]
        params = {**record["params"], "max_tokens": record["params"]["max_tokens"] - done}
        return right(cls, request_id, {**record, "num_prompt_tokens": len(record["token_ids"]), "params": params})

    patch.setattr(Request, "from_record", classmethod(from_record))


AXIS = Axis(
    values=(False, True),
    play=play,
    mutants=(Mutant(forgets_what_is_output, load=64, sampling="penalised", resumed=True),),
)
