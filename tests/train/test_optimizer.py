"""AdamW equals torch's; the norm has one order of sums."""

import math

import pytest
import torch

from headrace.train.config import TrainConfig
from headrace.train.optimizer import NORM_CHUNK, AdamW, global_norm


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


SHAPES = ((5, 7), (7,), (3 * NORM_CHUNK + 5,), (1, 1))


def test_adamw_equals_torch():
    config = TrainConfig(steps=10, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    ours, theirs = tensors(*SHAPES), tensors(*SHAPES)
    groups = [{"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    optimizer = AdamW(ours, config)
    for step, rate in enumerate((0.1, 0.03, 0.01)):
        grads = tensors(*SHAPES, seed=step + 1)
        optimizer.step(grads, rate, scale=0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        for parameter, grad in zip(theirs, grads):
            parameter.grad = grad * 0.5
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_norm_is_the_norm_in_fp64():
    grads = tensors(*SHAPES)
    together = torch.cat([grad.flatten() for grad in grads]).double()
    assert global_norm(grads) == pytest.approx(together.norm().item(), rel=1e-14)
    assert global_norm([]) == 0.0


def test_the_norm_does_not_depend_on_threads_or_on_who_holds_which_chunk():
    grads = tensors((64 * NORM_CHUNK + 100,), (300, 70))
    threads, norms = torch.get_num_threads(), set()
    for count in (1, 2):
        torch.set_num_threads(count)
        norms.add(global_norm(grads))
    torch.set_num_threads(threads)
    cut = 17 * NORM_CHUNK
    norms.add(global_norm([grads[1], grads[0][cut:], grads[0][:cut]]))
    assert len(norms) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_of_what_is_no_number_is_nan(bad):
    assert math.isnan(global_norm([torch.ones(3), torch.tensor([1.0, bad])]))
