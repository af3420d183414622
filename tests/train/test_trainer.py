"""Training learns, twice the same, with the server's bits, into a folder that others can read."""

import dataclasses
import math

import pytest
import torch

from headrace import LLM, SamplingParams
from headrace.attention.dense import DenseContext
from headrace.attention.paged import PagedContext
from headrace.attention.store import KVStore
from headrace.errors import ConfigError
from headrace.kernels.ops import AttentionMeta
from headrace.train.config import load_recipe
from headrace.train.flops import model_flops
from headrace.train.trainer import Trainer


def test_training_reduces_the_loss(recipe_file, cpu_ops):
    trainer = Trainer(load_recipe(recipe_file, ["train.steps=30"]), cpu_ops)
    before = trainer.validation_loss(64)
    losses = [trainer.step().loss for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(320), abs=1.0)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    after = trainer.validation_loss(64)
    assert before is not None and after is not None and after < 0.7 * before


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
                table,
                torch.tensor([0, len(positions)], dtype=torch.int32),
                torch.tensor([begin + len(positions)], dtype=torch.int32),
                table[0, positions.long() // size] * size + positions % size,
                len(positions),
                begin + len(positions),
            )
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
    [batch] = trainer.source.validation(96, 4, 4)
    ours = trainer.log_probabilities(batch)
    assert ours.requires_grad
    with torch.no_grad():
        server = trainer.model.with_ops(cpu_ops)
        theirs = paged_log_probabilities(server, cpu_ops, batch, chunk, getattr(torch, cache))
    assert torch.equal(ours.detach(), theirs)


def test_a_text_has_the_same_bits_whatever_it_is_packed_with(recipe, cpu_ops):
    trainer = Trainer(recipe, cpu_ops)
    batch = trainer.source.validation(96, 5, 40)[0]
    together = trainer.log_probabilities(batch).detach()
    assert batch.num_rows == 5 and len(batch.lengths) > 5
    for part in batch.split(5):
        mine = torch.isin(batch.tokens_T[batch.rows_R], part.tokens_T[part.rows_R])
        assert torch.equal(together[mine], trainer.log_probabilities(part).detach())


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
    [batch] = trainer.source.validation(96, 6, 6)

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


def test_divergence_is_a_clear_error(recipe_file, cpu_ops):
    trainer = Trainer(
        load_recipe(recipe_file, ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "optimizer.grad_clip=0"]),
        cpu_ops,
    )
    with pytest.raises(ConfigError, match=r"at step [23], whose batch begins at .*documents.*lower optimizer\.learn"):
        for _ in range(3):
            trainer.step()


def test_a_steps_gradient_is_that_of_the_log_probabilities(recipe_file, cpu_ops):
    """The fused loss of a step, which never holds all logits, against the plain way."""
    trainer, plain = (Trainer(load_recipe(recipe_file, ["optimizer.grad_clip=0"]), cpu_ops) for _ in range(2))
    batch = plain.source.stream(2, 96).next()
    logprob_R = plain.log_probabilities(batch)
    grads = torch.autograd.grad(-logprob_R.double().mean(), plain.parameters)
    record = trainer.step()
    assert record.loss == pytest.approx(-logprob_R.double().mean().item(), rel=1e-12)
    assert record.grad_norm == pytest.approx(math.sqrt(sum(g.double().square().sum().item() for g in grads)), rel=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_micro_batches_change_nothing_but_the_order_of_sums(recipe_file, cpu_ops, parts):
    rows = ["train.batch_size=4", "train.steps=4"]
    whole = Trainer(load_recipe(recipe_file, rows), cpu_ops)
    cut = Trainer(load_recipe(recipe_file, [*rows, f"train.micro_batches={parts}"]), cpu_ops)
    first, second = whole.step(), cut.step()
    assert first.loss == second.loss and first.tokens == second.tokens and first.flops == second.flops
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)
    for _ in range(3):
        first, second = whole.step(), cut.step()
    assert first.loss == pytest.approx(second.loss, rel=1e-3)


def saved_bytes(trainer, batch):
    """(log-probabilities, bytes that forward keeps for backward, parameters not counted)."""
    parameters = {p.untyped_storage().data_ptr() for p in trainer.parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprob_R = trainer.log_probabilities(batch)
    return logprob_R, sum(kept.values())


def test_recomputation_keeps_less_and_has_the_same_bits(recipe_file, cpu_ops):
    kept, grads, losses = {}, {}, {}
    for what in ("none", "selective", "full"):
        trainer = Trainer(load_recipe(recipe_file, [f"train.recompute={what}", "model.num_layers=4"]), cpu_ops)
        batch = trainer.source.validation(96, 8, 60)[0]
        logprob_R, kept[what] = saved_bytes(trainer, batch)
        grads[what] = torch.autograd.grad(logprob_R.sum(), trainer.parameters)
        losses[what] = [dataclasses.astuple(trainer.step()) for _ in range(3)]
    for what in ("selective", "full"):
        assert all(map(torch.equal, grads[what], grads["none"])) and losses[what] == losses["none"]
    assert kept["full"] < 0.6 * kept["selective"] and kept["selective"] < 0.8 * kept["none"]


def test_a_recomputing_trainer_is_sampled_and_validated_as_any(recipe_file, cpu_ops):
    trainer, plain = (
        Trainer(load_recipe(recipe_file, [f"train.recompute={what}"]), cpu_ops) for what in ("full", "none")
    )
    assert trainer.validation_loss(8) == plain.validation_loss(8)
    ids, ctx = torch.tensor([5, 6, 7]), DenseContext(cpu_ops, trainer.config, [3])
    positions = torch.arange(3, dtype=torch.int32)
    twin = trainer.model.with_ops(cpu_ops)
    assert torch.equal(twin(ids, positions, ctx), plain.model.with_ops(cpu_ops)(ids, positions, ctx))


def test_the_operations_of_a_step_are_those_of_its_products(recipe, cpu_ops):
    trainer = Trainer(recipe, cpu_ops)
    batch = trainer.source.validation(96, 2, 20)[0]
    blocks = sum(p.numel() for block in trainer.model.blocks for p in block.parameters())
    expected = 6 * blocks * batch.num_tokens + 6 * 320 * 32 * len(batch.rows_R)
    expected += 12 * 2 * 4 * 8 * sum(n * (n + 1) // 2 for n in batch.lengths)
    assert model_flops(trainer.model, batch) == expected


def test_a_window_bounds_the_operations_of_attention(recipe_file, cpu_ops):
    flops = []
    for window in (0, 5, 96):
        trainer = Trainer(load_recipe(recipe_file, [f"model.sliding_window={window}"]), cpu_ops)
        batch = trainer.source.validation(96, 2, 20)[0]
        flops.append(model_flops(trainer.model, batch))
    seen = sum(sum(min(i + 1, 5) - (i + 1) for i in range(n)) for n in batch.lengths)
    assert flops[2] == flops[0] and flops[1] - flops[0] == 12 * 2 * 4 * 8 * seen


def test_ranks_that_are_not_there_are_asked_for(recipe_file, cpu_ops):
    with pytest.raises(ConfigError, match="headrace train --processes 2"):
        Trainer(load_recipe(recipe_file, ["parallel.tensor=2"]), cpu_ops)


def test_an_engine_around_the_trainers_model_follows_its_steps(recipe, cpu_ops):
    """Nothing of a weight is kept between two generations: the second has the bits of a new engine."""
    trainer = Trainer(recipe, cpu_ops)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)

    def engine():
        model = trainer.model.with_ops(cpu_ops)
        return LLM.from_model(model, trainer.tokenizer, cpu_ops, prefix_caching=False, kv_cache_memory="16MiB")

    with engine() as llm:
        before = llm.generate("Mia went", params)[0].outputs
        trainer.step()
        after = llm.generate("Mia went", params)[0].outputs
    with engine() as llm:
        assert after == llm.generate("Mia went", params)[0].outputs != before
