"""Batches: every token once an epoch, resumed anywhere, shared out by rows; of tinyworld and of a folder."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.train.config import DataConfig
from headrace.train.corpus.folder import Corpus
from headrace.train.corpus.order import permutation
from headrace.train.data import open_source
from train.corpus_kit import built, some_text, whole_document, write_jsonl

SHUFFLES = ("documents", "pieces")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 documents, some much longer than a row, over several shards."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("folder")
    file = write_jsonl(path / "texts.jsonl", [{"text": some_text(rng, rng.choice([1, 3, 8, 60]))} for _ in range(60)])
    built(path, file, validation=0.1, shard_tokens=500)
    return path / "data"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """40 conversations: masked, some with long stretches in which nothing counts."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("chats")
    file = write_jsonl(
        path / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": role, "content": some_text(rng, rng.choice([1, 30]))}
                    for _ in range(rng.randint(1, 3))
                    for role in ("user", "assistant")
                ]
            }
            for _ in range(40)
        ],
    )
    built(path, file, chat=True, shard_tokens=700)
    return path / "data"


@pytest.fixture(scope="module", params=["tinyworld", "documents", "pieces", "chats"])
def source(request):
    """Each kind of data."""
    if request.param == "tinyworld":
        return open_source(DataConfig(vocab_size=300, seed=2))
    path = request.getfixturevalue("chats" if request.param == "chats" else "folder")
    return open_source(DataConfig(str(path), 0, 2, request.param if request.param in SHUFFLES else "documents"))


def plain(batch):
    """A batch as what can be compared."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in ((name, getattr(batch, name)) for name in type(batch).__slots__)
    }


def sequences(batch):
    """(row, inputs, (place, target) of what counts) of every sequence."""
    targets = dict(zip(batch.rows_R.tolist(), batch.targets_R.tolist()))
    out, start = [], 0
    for row, length in zip(batch.row_of, batch.lengths):
        places = range(start, start + length)
        out.append(
            (
                row,
                batch.ids_T[start : start + length].tolist(),
                [(place - start, targets[place]) for place in places if place in targets],
            )
        )
        start += length
    return out


def test_batches_have_their_shape(source):
    stream = source.stream(3, 32)
    for _ in range(20):
        batch = stream.next()
        assert batch.num_rows == 3 and sorted(set(batch.row_of)) == [0, 1, 2] and batch.row_of == sorted(batch.row_of)
        assert sum(batch.lengths) == batch.num_tokens == len(batch.positions_T) == len(batch.tokens_T)
        assert batch.positions_T.tolist() == [i for length in batch.lengths for i in range(length)]
        assert (batch.ids_T.dtype, batch.positions_T.dtype, batch.rows_R.dtype, batch.targets_R.dtype) == (
            torch.int64,
            torch.int32,
            torch.int64,
            torch.int64,
        )
        fill = np.bincount(batch.row_of, weights=batch.lengths)
        assert fill.max() <= 32 and len(batch.rows_R) > 0
        for _, ids, counted in sequences(batch):
            assert counted, "a sequence in which nothing counts"
            assert all(ids[place + 1] == target for place, target in counted if place + 1 < len(ids))


def test_rows_are_filled_greedily(source):
    batch = source.stream(5, 64).next()
    rows = [[n for r, n in zip(batch.row_of, batch.lengths) if r == row] for row in range(5)]
    for row, after in zip(rows, rows[1:]):
        assert sum(row) + after[0] > 64


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 25), st.integers(1, 4), st.sampled_from([16, 33, 64]))
def test_resumed_anywhere_the_same_batches_come(source, steps, batch_size, seq_length):
    stream = source.stream(batch_size, seq_length)
    for _ in range(steps):
        stream.next()
    state = json.loads(json.dumps(stream.state()))
    expected = [plain(stream.next()) for _ in range(6)]
    again = source.stream(batch_size, seq_length, state)
    assert again.state() == state
    assert [plain(again.next()) for _ in range(6)] == expected


def test_a_state_goes_on_with_another_batch_size(source):
    def pieces(stream, n):
        found: list[Any] = []
        while len(found) < n:
            found += [(ids, counted) for _, ids, counted in sequences(stream.next())]
        return found[:n]

    small = source.stream(2, 32)
    taken = [(ids, counted) for _ in range(4) for _, ids, counted in sequences(small.next())]
    whole = pieces(source.stream(1, 32), len(taken) + 30)
    assert taken == whole[: len(taken)]
    assert pieces(source.stream(3, 32, small.state()), 30) == whole[len(taken) :]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.integers(1, 12), st.data())
def test_shares_and_micro_batches_are_the_whole(source, skip, batch_size, data):
    stream = source.stream(batch_size, 32)
    for _ in range(skip):
        stream.next()
    batch = stream.next()
    parts = data.draw(st.integers(1, batch_size))
    shares = batch.split(parts)
    together = sorted(
        (row * parts + part, n, ids, counted)
        for part, share in enumerate(shares)
        for n, (row, ids, counted) in enumerate(sequences(share))
    )
    assert [one[0::2] for one in together] == [(row, ids) for row, ids, _ in sequences(batch)]
    assert sorted((row, ids, counted) for row, _, ids, counted in together) == sorted(sequences(batch))
    assert sorted(token for share in shares for token in share.tokens_T.tolist()) == batch.tokens_T.tolist()
    for part, share in enumerate(shares):
        assert batch.ids_T[share.tokens_T].tolist() == share.ids_T.tolist()
        inner = data.draw(st.integers(1, share.num_rows))
        for i, micro in enumerate(share.split(inner)):
            if parts * inner <= batch.num_rows:
                assert plain(micro) == plain(batch.share(part + parts * i, parts * inner))


def test_more_parts_than_rows_are_refused(source):
    batch = source.stream(2, 32).next()
    with pytest.raises(ConfigError, match=r"a batch of 2 rows has no part 0 of 3: raise train\.batch_size"):
        batch.split(3)


def epoch(corpus_source, number, seq_length):
    """The sequences of one epoch, in order."""
    state = {**corpus_source.stream(1, seq_length).state(), "epoch": number, "pieces": 0}
    stream, found = corpus_source.stream(1, seq_length, state), []
    while stream.state()["epoch"] == number:
        found += [(ids, counted) for _, ids, counted in sequences(stream.next())]
        assert len(found) < 10_000
    return found


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("seq_length", [7, 32, 500])
def test_an_epoch_has_every_token_of_every_training_document_once(folder, shuffle, seq_length):
    source = open_source(DataConfig(str(folder), 0, 5, shuffle))
    corpus = Corpus(folder)
    expected = sorted(
        (tuple(ids[:-1][i : i + seq_length]), tuple(ids[1:][i : i + seq_length]))
        for ids in (whole_document(corpus, int(d))[0] for d in corpus.training)
        for i in range(0, len(ids) - 1, seq_length)
    )
    for number in (0, 1, 7):
        # An epoch's last batch may end with the first pieces of the next.
        found = [
            (tuple(ids), tuple(target for _, target in counted)) for ids, counted in epoch(source, number, seq_length)
        ][: len(expected)]
        assert sorted(found) == expected


def test_counted_tokens_of_chats_come_once_an_epoch(chats):
    corpus = Corpus(chats)
    expected = sum(sum(whole_document(corpus, int(d))[1]) for d in corpus.training)
    pieces, total, number = corpus.pieces(16, None), 0, 0
    while pieces.state()["epoch"] == 0:
        total, number = total + int(pieces.peek().counts[1:].sum()), number + 1
        pieces.advance()
        pieces.peek()
    assert total == expected
    assert number < sum(-(-(int(n) - 1) // 16) for n in corpus.lengths[corpus.training]), "none was left out"


def test_the_order_is_of_the_seed_and_the_epoch(folder):
    def order(seed, number, shuffle="documents"):
        return epoch(open_source(DataConfig(str(folder), 0, seed, shuffle)), number, 32)

    assert order(1, 0) == order(1, 0)
    orders = [order(1, 0), order(1, 1), order(2, 0), order(1, 0, "pieces")]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_pieces_of_a_document_stay_together_or_are_spread(folder):
    def jumps(shuffle):
        found = epoch(open_source(DataConfig(str(folder), 0, 0, shuffle)), 0, 16)
        return sum(counted[-1][1] != after[0] for (_, counted), (after, _) in zip(found, found[1:]))

    assert jumps("documents") < jumps("pieces")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.integers(0, 2**70), st.integers(0, 2**64 - 1))
def test_permutations_hold_everything_once(n, seed, number):
    order = permutation(n, seed, number)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == permutation(n, seed, number).tolist()


def test_a_permutation_is_the_same_everywhere():
    assert permutation(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_validation_is_apart_and_complete(source):
    found = [(ids, counted) for batch in source.validation(32, 4) for _, ids, counted in sequences(batch)]
    assert found and all(counted for _, counted in found)
    assert all(batch.num_rows == 4 for batch in source.validation(32, 4)[:-1])
    few = source.validation(32, 2, 3)
    assert [(ids, counted) for batch in few for _, ids, counted in sequences(batch)] == found[:3]


def test_held_out_documents_are_not_trained_on(folder):
    corpus = Corpus(folder)
    assert set(corpus.validation) | set(corpus.training) == set(range(60))
    assert len(corpus.validation) == 6 and not set(corpus.validation) & set(corpus.training)


def test_prompts_suit_the_data(source):
    prompts = source.prompts(3)
    assert len(prompts) == 3 and all(isinstance(prompt, str) and prompt for prompt in prompts)
    assert all(source.tokenizer.encode(prompt) for prompt in prompts)


def test_prompts_of_chats_end_where_the_assistant_begins(chats):
    assert all(
        prompt.startswith("<|user|>") and prompt.endswith("<|assistant|>")
        for prompt in open_source(DataConfig(str(chats), 0)).prompts(5)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"data\.seed=0, this run has 1"),
        ({"shuffle": "pieces"}, r"data\.shuffle='documents', this run has 'pieces'"),
    ],
)
def test_a_state_of_other_settings_is_refused(folder, change, message):
    state = open_source(DataConfig(str(folder), 0)).stream(2, 32).state()
    other = open_source(DataConfig(str(folder), 0, **change))
    with pytest.raises(ConfigError, match=message):
        other.stream(2, 32, state)


def test_a_state_of_other_data_is_refused(folder, chats):
    source = open_source(DataConfig(str(folder), 0))
    state = source.stream(2, 32).state()
    with pytest.raises(ConfigError, match=r"data\.source="):
        open_source(DataConfig(str(chats), 0)).stream(2, 32, state)
    with pytest.raises(ConfigError, match=r"train\.seq_length=32, this run has 16"):
        source.stream(2, 16, state)
    for damaged in ({}, {**state, "epoch": -1}, {**state, "pieces": "3"}, {**state, "pieces": 10**9}, {"x": 1}):
        with pytest.raises(ConfigError, match="data state is damaged"):
            source.stream(2, 32, damaged)
    with pytest.raises(ConfigError, match="data state is damaged"):
        open_source(DataConfig()).stream(2, 32, state)


def test_the_configuration_agrees_with_the_folder(folder):
    size = open_source(DataConfig(str(folder), 0)).tokenizer.vocab_size
    assert DataConfig(str(folder), 0).resolved().vocab_size == size
    assert DataConfig(str(folder), size + 20).resolved().vocab_size == size + 20
    with pytest.raises(ConfigError, match=rf"data\.vocab_size={size - 1} is less than the {size} tokens .* or 0"):
        DataConfig(str(folder), size - 1)
    for bad, message in (
        ({"source": "nowhere"}, r"data\.source='nowhere' is neither tinyworld nor a folder"),
        ({"source": ""}, r"data\.source"),
        ({"source": str(folder.parent)}, r"data\.source: .*index"),
        ({"vocab_size": 0}, r"data\.vocab_size=0.*tinyworld"),
        ({"seed": -1}, r"data\.seed"),
        ({"shuffle": "rows"}, r"data\.shuffle='rows'"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataConfig(**bad)
