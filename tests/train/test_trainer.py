"""Training learns, twice the same, with the server's bits, into a folder that others can read."""

import dataclasses
import json
import math

import pytest
import torch

from headrace.attention.dense import DenseContext
from headrace.attention.paged import PagedContext
from headrace.attention.store import KVStore
from headrace.errors import ConfigError
from headrace.kernels.ops import AttentionMeta
from headrace.model.huggingface import load_model
from headrace.text.tokenizer import Tokenizer
from headrace.train.config import load_recipe
from headrace.train.data import batches, collate
from headrace.train.tinyworld import Document
from headrace.train.trainer import Trainer, train


def test_training_reduces_the_loss(recipe_file, cpu_ops):
    trainer = Trainer(load_recipe(recipe_file, ["train.steps=30"]), cpu_ops)
    before = trainer.validation_loss(64)
    losses = [trainer.step().loss for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(320), abs=1.0)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    assert trainer.validation_loss(64) < 0.7 * before


def paged_log_probabilities(model, ops, batch, chunk, cache_dtype):
    """As the engine computes them: each text by itself, in chunks, over scattered blocks of a shared store."""
    config, size = model.config, 8
    store = KVStore(40, config.num_layers, config.num_kv_heads, size, config.head_dim, cache_dtype)
    out, start = [], 0
    for length in batch.lengths:
        table = torch.tensor([[3 + 2 * ((i * 7) % 17) for i in range(-(-length // size))]], dtype=torch.int32)
        ids, logits = batch.ids_T[start : start + length], []
        for begin in range(0, length, chunk):
            positions = torch.arange(begin, min(begin + chunk, length), dtype=torch.int32)
            meta = AttentionMeta(
                table, torch.tensor([0, len(positions)], dtype=torch.int32),
                torch.tensor([begin + len(positions)], dtype=torch.int32),
                table[0, positions.long() // size] * size + positions % size, len(positions), begin + len(positions))
            logits.append(model(ids[positions.long()], positions, PagedContext(ops, store, meta, config)))
        logits_TV = torch.cat(logits)
        mine = (batch.rows_R >= start) & (batch.rows_R < start + length)
        rows_RV = logits_TV[batch.rows_R[mine] - start].contiguous()
        lse_R = ops.logsumexp(rows_RV, model.vocab_bounds)
        out.append(ops.score(rows_RV, lse_R, batch.targets_R[mine])[0])
        start += length
    return torch.cat(out)


@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_log_probabilities_are_the_servers_to_the_bit(recipe_file, cpu_ops, chunk, cache):
    trainer = Trainer(load_recipe(recipe_file, [f"train.kv_cache_dtype={cache}"]), cpu_ops)
    trainer.step()
    batch = collate(trainer.source.validation(4), trainer.tokenizer, 96)
    ours = trainer.log_probabilities(batch)
    assert ours.requires_grad
    with torch.no_grad():
        server = trainer.model.with_ops(cpu_ops)
        theirs = paged_log_probabilities(server, cpu_ops, batch, chunk, getattr(torch, cache))
    assert torch.equal(ours.detach(), theirs)


def test_a_text_has_the_same_bits_whatever_it_is_packed_with(recipe, cpu_ops):
    trainer = Trainer(recipe, cpu_ops)
    texts = trainer.source.validation(5)
    together = trainer.log_probabilities(collate(texts, trainer.tokenizer, 96)).detach()
    alone = [trainer.log_probabilities(collate([text], trainer.tokenizer, 96)).detach() for text in texts]
    assert torch.equal(together, torch.cat(alone))


def run(recipe, ops, steps):
    trainer = Trainer(recipe, ops)
    return [dataclasses.astuple(trainer.step()) for _ in range(steps)], [p.detach().clone() for p in trainer.parameters]


def test_the_same_recipe_trains_to_the_same_bits(recipe_file, cpu_ops):
    recipe = load_recipe(recipe_file)
    (first, weights), (second, again) = run(recipe, cpu_ops, 4), run(recipe, cpu_ops, 4)
    assert first == second
    assert all(map(torch.equal, weights, again))
    other, _ = run(load_recipe(recipe_file, ["train.seed=1"]), cpu_ops, 1)
    assert other[0] != first[0]


def test_gradients_are_those_of_plain_torch(recipe, cpu_ops):
    """The loss's gradient by every parameter, against finite differences along a random direction."""
    trainer = Trainer(recipe, cpu_ops)
    batch = collate(trainer.source.validation(6), trainer.tokenizer, 96)

    def loss():
        return -trainer.log_probabilities(batch).double().mean()

    grads = torch.autograd.grad(loss(), trainer.parameters)
    generator = torch.Generator().manual_seed(0)
    for parameter, grad in zip(trainer.parameters, grads):
        direction = torch.randn(parameter.shape, generator=generator)
        direction /= direction.norm()
        step = 2e-2
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(loss().item())
                parameter.add_(direction, alpha=-sign * step)
        expected = (values[0] - values[1]) / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(expected, abs=2e-3, rel=0.05)


def test_a_run_leaves_metrics_and_a_folder(recipe_file, tmp_path, cpu_ops):
    recipe = load_recipe(recipe_file, ["train.sample_every=4"])
    seen, sampled = [], []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("of an earlier run\n")
    result = train(recipe, tmp_path / "run", seen.append,
                   lambda model, tokenizer, step: sampled.append((step, tokenizer.vocab_size)), ops=cpu_ops)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [dataclasses.asdict(record) for record in seen]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "tokens"}
    assert (result.first_loss, result.final_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert result.tokens == sum(line["tokens"] for line in lines)
    assert sampled == [(4, 320)]
    assert math.isfinite(result.validation_loss)
    assert result.checkpoint == tmp_path / "run" / "hf"


def test_the_folder_loads_here_and_in_transformers(recipe, tmp_path, cpu_ops):
    transformers = pytest.importorskip("transformers")
    checkpoint = train(recipe, tmp_path / "run", ops=cpu_ops).checkpoint
    names = {file.name for file in checkpoint.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "generation_config.json"}
    ours, theirs = Tokenizer.from_folder(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": "What is 3+4?"}]
    text = ours.apply_chat_template(chat)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for prompt in (text, "Once upon a time, Mia", "漢 😀 12"):
        assert ours.encode(prompt) == theirs(prompt)["input_ids"]
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    model = load_model(checkpoint, cpu_ops)
    peer = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor(ours.encode(text))
    with torch.no_grad():
        logits = model(ids, torch.arange(len(ids), dtype=torch.int32),
                       DenseContext(cpu_ops, model.config, [len(ids)]))
        expected = peer(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert model.config.eos_token_ids == (0,)


def test_divergence_is_a_clear_error(recipe_file, cpu_ops):
    trainer = Trainer(load_recipe(recipe_file, ["train.learning_rate=1e30", "train.warmup_steps=0",
                                                "train.grad_clip=0"]), cpu_ops)
    with pytest.raises(ConfigError, match=r"at step [23].*lower train\.learning_rate"):
        for _ in range(3):
            trainer.step()


def test_the_cli_may_stop_a_run_and_keep_what_was_measured(recipe, tmp_path, cpu_ops):
    def interrupt(record):
        if record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, interrupt, ops=cpu_ops)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_batches_hold_whole_texts_and_count_replies_only(recipe, cpu_ops):
    trainer = Trainer(recipe, cpu_ops)
    tokenizer = trainer.tokenizer
    texts = [Document((("<|user|>hi<|end|><|assistant|>", "yes"), ("<|user|>x<|end|><|assistant|>", "no"))),
             Document((("", "story " * 200),)), Document((("", "end"),)), Document((("", "fin"),))]
    got = list(batches(texts, tokenizer, 2, 40))
    assert [batch.lengths[1:] == [40] or len(batch.lengths) for batch in got] == [True, 2]
    first = got[0]
    assert first.num_tokens == sum(first.lengths) == len(first.positions_T)
    assert first.positions_T.tolist()[: first.lengths[0]] == list(range(first.lengths[0]))
    counted = [tokenizer.token_text(i) for i in first.targets_R[first.rows_R < first.lengths[0]].tolist()]
    assert "".join(counted) == "yes<|end|>no<|end|>"
    inside = [row for row in first.rows_R.tolist() if row + 1 < first.lengths[0]]
    assert first.ids_T[[row + 1 for row in inside]].tolist() == first.targets_R[: len(inside)].tolist()
