"""AdamW equals torch's; the norm has one order of sums."""

import math

import pytest
import torch

from headrace.train.config import OptimizerConfig
from headrace.train.optimizer import AdamW, PairwiseSum, ParameterGroup, global_norm
from headrace.zero.layout import CHUNK


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = ((5, 7), (7,), (3 * CHUNK + 5,), (1, 1))


def updated(parameters):
    return [ParameterGroup(parameter.view(-1), parameter.ndim == 2) for parameter in parameters]


def flat(grads):
    return [grad.reshape(-1) for grad in grads]


def chunked(grads):
    return [(grad.reshape(-1), CHUNK) for grad in grads]


def test_adamw_equals_torch(cpu_ops):
    config = OptimizerConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    ours, theirs = tensors(*SHAPES), tensors(*SHAPES)
    groups = [
        {"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    optimizer = AdamW(updated(ours), config, cpu_ops)
    for step, rate in enumerate((0.1, 0.03, 0.01)):
        grads = tensors(*SHAPES, seed=step + 1)
        optimizer.step(flat(grads), rate, scale=0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        for parameter, grad in zip(theirs, grads):
            parameter.grad = grad * 0.5
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_only_matrices_decay(cpu_ops):
    matrix, norm = torch.ones(2, 3), torch.ones(3)
    optimizer = AdamW(updated([matrix, norm]), OptimizerConfig(weight_decay=0.5), cpu_ops)
    optimizer.step([torch.zeros(6), torch.zeros(3)], rate=0.1)
    assert matrix.unique().tolist() == pytest.approx([0.95]) and norm.unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_too_small_for_sixteen_bits_add_up_in_the_master(cpu_ops, dtype):
    """A step of 1e-5 is less than half of what either dtype can tell from 1."""
    weight = torch.ones(1, 40, dtype=dtype)
    optimizer = AdamW(updated([weight]), OptimizerConfig(weight_decay=0.0), cpu_ops)
    for step in range(1000):
        optimizer.step([torch.ones(40, dtype=dtype)], rate=1e-5)
        assert step > 10 or weight.eq(1).all()
    [master] = optimizer.tensors()["master"]
    assert master is not None
    assert master.mean().item() == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(weight.view(-1), master.to(dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8])
def test_micro_batches_gradients_are_added_in_one_balanced_tree(count):
    parts, total = tensors(*[(33,)] * count), PairwiseSum()
    for part in parts:
        total.add([part.clone()])
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])] + parts[len(parts) // 2 * 2 :]
    assert torch.equal(total.total()[0], parts[0])


def test_the_norm_is_the_norm_in_fp64(cpu_ops):
    grads = tensors(*SHAPES)
    together = torch.cat([grad.flatten() for grad in grads]).double()
    assert global_norm(chunked(grads), cpu_ops) == pytest.approx(together.norm().item(), rel=1e-14)
    assert global_norm([], cpu_ops) == 0.0


def test_the_norm_does_not_depend_on_threads_or_on_who_holds_which_chunk(cpu_ops):
    grads = tensors((64 * CHUNK + 100,), (300, 70))
    threads, norms = torch.get_num_threads(), set()
    for count in (1, 2):
        torch.set_num_threads(count)
        norms.add(global_norm(chunked(grads), cpu_ops))
    torch.set_num_threads(threads)
    cut = 17 * CHUNK
    norms.add(global_norm(chunked([grads[1], grads[0][cut:], grads[0][:cut]]), cpu_ops))
    assert len(norms) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_of_what_is_no_number_is_nan(cpu_ops, bad):
    assert math.isnan(global_norm(chunked([torch.ones(3), torch.tensor([1.0, bad])]), cpu_ops))
