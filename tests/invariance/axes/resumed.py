"""Whether a request begins in one process and ends in another."""

from dataclasses import replace

from headrace.llm.records import ResumeRecord
from invariance.axis import Axis, Mutant
from invariance.driving import Trace
from invariance.records import known_tokens, record_of

STEPS = 6
"""Steps before the requests move."""


def play(run, _) -> dict[int, Trace]:
    known = {item.request_id: len(item.token_ids) for item in run.requests}
    before = run.drive(STEPS)
    records = {item.request_id: record_of(item) for item in run.requests}
    after = run.elsewhere(records, resumed=False)
    traces = {}
    for number, record in records.items():
        tokens = known_tokens(record)
        logits = {p: row for p, row in before[number].logits.items() if p < len(tokens)}
        traces[number] = Trace(tokens[known[number] :] + after[number].tokens, {**logits, **after[number].logits})
    return traces


def forgets_what_is_output(patch):
    """A record that counts the output so far as prompt, so that penalties no longer see it."""
    right = ResumeRecord.requests

    def requests(self, request_ids, weights_version):
        [choice] = self.output.outputs
        params = replace(self.params, max_tokens=self.params.max_tokens - len(choice.token_ids))
        changed = ResumeRecord.begin("", None, known_tokens(self), params, self.priority)
        return right(changed, request_ids, weights_version)

    patch.setattr(ResumeRecord, "requests", requests)


AXIS = Axis(
    values=(False, True),
    play=play,
    mutants=(Mutant(forgets_what_is_output, load=64, sampling="penalised", resumed=True),),
)
