"""Log-sum-exp, scores and sampling on the CPU: one row at a time, every row by itself.

The meaning is `kernels/reference/sample.py`'s, bit for bit where the logits are equal: the noise comes from the
same integer hash, probabilities are added as the same integers (so a cut needs no order of summation), and only
exp and log may differ from torch's in the last place. Sorting is replaced by a radix search for the cut: three
passes over the row find the shortest prefix of (logit descending, id ascending) whose weight reaches a target.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.extending import intrinsic

from headrace.kernels.cpu.launch import kernel
from headrace.kernels.cpu.memory import load1, load8, store1, store8
from headrace.kernels.cpu.simd import LANES, add8, div8, exp1, exp8, hmax8, hsum8, log1, log8, max8, splat8, sub8, zero8

__all__ = ["STEP", "gumbel", "logsumexp_parts", "merge_logsumexp", "mix", "sample", "score", "top_logprobs"]

NEVER = np.float32(-np.inf)
GREATEST = np.finfo(np.float32).max
FIXED_POINT = np.float32(2.0**40)
DIGITS = ((21, 11), (10, 11), (0, 10))
"""The radix search's (shift, bits), from the top of an order key of 32 bits."""
STRETCH = 128
"""Logits that are looked at together, to pass over those that cannot be among the best."""

STEP = np.uint64(0x9E3779B97F4A7C15)
MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


@intrinsic
def _bits(tyctx: Any, x: Any) -> Any:
    """The bit pattern of an fp32 value."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


# ---- noise -----------------------------------------------------------------------------------------------------


@kernel
def mix(x):
    """splitmix64's finalizer: a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * MULTIPLY_2
    return x ^ (x >> np.uint64(31))


@kernel
def _row_key(seed, choice, position):
    key = mix(np.uint64(seed) + STEP)
    key = mix((key ^ np.uint64(choice)) + STEP)
    return mix((key ^ np.uint64(position)) + STEP)


@kernel
def _uniform(key, out_V):
    """v in (0, 1) for every token, from 31 bits of its hash: the small ones are fine-grained."""
    for i in range(out_V.size):
        bits = np.int32(mix(key + np.uint64(i + 1) * STEP) >> np.uint64(33))
        out_V[i] = min((np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-31), np.float32(1.0 - 2.0**-24))


@kernel
def _gumbel8(v):
    """Standard Gumbel noise −log(−log(1 − v)), as exact for small v (large noise) as fp32 allows."""
    one = splat8(np.float32(1.0))
    u = sub8(one, v)
    lost = add8(sub8(u, one), v)  # what rounding 1 − v loses; log(u − lost) ≈ log u − lost / u
    return sub8(zero8(), log8(sub8(div8(lost, u), log8(u))))


@kernel
def gumbel(seed, choice, position, out_V):
    """The noise of one row's every token. The length is a multiple of 8."""
    _uniform(_row_key(seed, choice, position), out_V)
    for i in range(0, out_V.size, LANES):
        store8(out_V, i, _gumbel8(load8(out_V, i)))


# ---- log-sum-exp and scores ------------------------------------------------------------------------------------


@kernel
def _shard(logits, first, last):
    """(m, e) of one vocabulary shard: e in eight lanes counted from the shard's start."""
    whole = last - (last - first) % LANES
    best = splat8(NEVER)
    for i in range(first, whole, LANES):
        best = max8(load8(logits, i), best)
    m = hmax8(best)
    for i in range(whole, last):
        m = max(m, load1(logits, i))
    if m == NEVER:
        return m, np.float32(0.0)
    best, total = splat8(m), zero8()
    for i in range(first, whole, LANES):
        total = add8(total, exp8(sub8(load8(logits, i), best)))
    if whole < last:
        tail = np.full(LANES, NEVER, np.float32)
        for i in range(whole, last):
            store1(tail, i - whole, load1(logits, i))
        total = add8(total, exp8(sub8(load8(tail, 0), best)))
    return m, hsum8(total)


@kernel(parallel=True)
def logsumexp_parts(logits_RV, bounds, out_RS2):
    """See `Ops.logsumexp_parts`. logits are C-contiguous fp32."""
    rows, vocab_size = logits_RV.shape
    shards = bounds.size - 1
    for item in prange(rows * shards):
        row, shard = item // shards, item % shards
        start = row * vocab_size
        m, e = _shard(logits_RV, start + bounds[shard], start + bounds[shard + 1])
        out_RS2[row, shard, 0] = m
        out_RS2[row, shard, 1] = e


@kernel
def merge_logsumexp(parts_RS2, out_R):
    """See `Ops.merge_logsumexp`; the parts are spoilt. A row of nothing but -inf gives -inf."""
    rows, shards = parts_RS2.shape[:2]
    for row in range(rows):
        count = shards
        while count > 1:
            count //= 2
            for i in range(count):
                left, right = parts_RS2[row, 2 * i], parts_RS2[row, 2 * i + 1]
                m = max(left[0], right[0])
                e = np.float32(0.0)
                if m != NEVER:
                    e = left[1] * exp1(left[0] - m) + right[1] * exp1(right[0] - m)
                parts_RS2[row, i, 0] = m
                parts_RS2[row, i, 1] = e
        out_R[row] = parts_RS2[row, 0, 0] + log1(parts_RS2[row, 0, 1])


@kernel
def _ordered(z):
    """A logit that has an order: NaN becomes -inf, +inf the greatest finite number, -0 plain 0."""
    if not z >= -GREATEST:
        return NEVER
    return min(z, GREATEST) + np.float32(0.0)


@kernel
def _logprob(z, lse):
    return NEVER if z == NEVER else z - lse


@kernel(parallel=True)
def score(logits_RV, lse_R, targets_R, out_logprob_R, out_rank_R):
    """See `Ops.score`."""
    for row in prange(logits_RV.shape[0]):
        target = targets_R[row]
        own = _ordered(logits_RV[row, target])
        rank = 1
        for i in range(logits_RV.shape[1]):
            z = _ordered(logits_RV[row, i])
            rank += (z > own) | ((z == own) & (i < target))
        out_logprob_R[row] = _logprob(own, lse_R[row])
        out_rank_R[row] = rank


@kernel(parallel=True)
def top_logprobs(logits_RV, lse_R, k, out_logprob_Rk, out_ids_Rk):
    """See `Ops.top_logprobs`; k ≤ V. Insertion into a sorted list: k is small."""
    for row in prange(logits_RV.shape[0]):
        values, ids, count = np.empty(k, np.float32), np.empty(k, np.int32), 0
        for start in range(0, logits_RV.shape[1], STRETCH):
            stop = min(start + STRETCH, logits_RV.shape[1])
            if count == k and not _any_above(logits_RV[row, start:stop], values[k - 1]):
                continue
            for i in range(start, stop):
                z = _ordered(logits_RV[row, i])
                if count == k and not z > values[k - 1]:
                    continue
                at = min(count, k - 1)
                while at > 0 and z > values[at - 1]:
                    values[at] = values[at - 1]
                    ids[at] = ids[at - 1]
                    at -= 1
                values[at] = z
                ids[at] = i
                count = min(count + 1, k)
        for i in range(k):
            out_logprob_Rk[row, i] = _logprob(values[i], lse_R[row])
            out_ids_Rk[row, i] = ids[i]


@kernel
def _any_above(z_V, bar):
    """Whether any logit is above the bar; a plain loop, which vectorises."""
    count = np.int32(0)
    for i in range(z_V.size):
        count += np.int32(z_V[i] > bar)
    return count > 0


# ---- which tokens are kept -------------------------------------------------------------------------------------


@kernel
def _order_key(z):
    """An unsigned integer with the order of the floats."""
    bits = _bits(z)
    return bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000))


@kernel
def _cut(z_V, weight_V, target):
    """(logit, count): the shortest prefix with weight ≥ target is every token above `logit`, and the first `count`
    at it. The target is at least 1 and at most the sum of the weights; equal logits have equal weights.
    """
    prefix, above, known = np.uint32(0), np.int64(0), np.uint32(0)
    sums = np.empty(2048, np.int64)
    for shift, bits in DIGITS:
        sums[:] = 0
        low = np.uint32((1 << bits) - 1)
        for i in range(z_V.size):
            key = _order_key(z_V[i])
            if key & known == prefix:
                sums[(key >> np.uint32(shift)) & low] += weight_V[i]
        digit = (1 << bits) - 1
        while above + sums[digit] < target:
            above += sums[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= low << np.uint32(shift)
    for i in range(z_V.size):
        if _order_key(z_V[i]) == prefix:
            return z_V[i], (target - above + weight_V[i] - 1) // weight_V[i]
    return NEVER, np.int64(z_V.size)


@kernel
def _drop(z_V, weight_V, cut, count):
    """Everything after a cut loses its weight."""
    for i in range(z_V.size):
        if z_V[i] == cut:
            count -= 1
            if count < 0:
                weight_V[i] = 0
        elif z_V[i] < cut:
            weight_V[i] = 0


@kernel
def _weigh(y_V, weight_V):
    """Probabilities relative to the best token's as integers of 2⁻⁴⁰, for those kept so far; their sum."""
    total = np.int64(0)
    for i in range(y_V.size):
        if weight_V[i]:
            weight_V[i] = np.int64(exp1(y_V[i]) * FIXED_POINT)
            total += weight_V[i]
    return total


@kernel
def _keep(z_V, y_V, kept_V, top_k, top_p, min_p):
    """kept_V[i] = 0 for what top-k, top-p and min-p drop."""
    kept_V[:] = 1
    if 0 < top_k < z_V.size:
        cut, count = _cut(z_V, kept_V, top_k)
        _drop(z_V, kept_V, cut, count)
    if top_p < 1:
        weight_V = kept_V.copy()
        total = _weigh(y_V, weight_V)
        target = min(max(np.int64(np.ceil(np.float64(top_p) * np.float64(total))), 1), total)
        cut, count = _cut(z_V, weight_V, target)
        _drop(z_V, kept_V, cut, count)
    if min_p > 0:
        for i in range(y_V.size):
            if exp1(y_V[i]) < min_p:
                kept_V[i] = 0


# ---- drawing ---------------------------------------------------------------------------------------------------


@kernel
def _greedy(z_V):
    """argmax, ties to the lowest id; NaN never wins, and a row without an order gives 0."""
    whole = z_V.size - z_V.size % LANES
    best8 = splat8(NEVER)
    for i in range(0, whole, LANES):
        best8 = max8(load8(z_V, i), best8)
    best = hmax8(best8)
    for i in range(whole, z_V.size):
        if z_V[i] > best:
            best = z_V[i]
    if best > NEVER:
        for i in range(z_V.size):
            if z_V[i] == best:
                return i
    return 0


@kernel
def _draw(logits_V, temperature, top_k, top_p, min_p, key):
    """argmax of (z − best z) / temperature + noise over the kept tokens. Rows are padded to whole vectors."""
    size = logits_V.size
    padded = (size + LANES - 1) // LANES * LANES
    z_V, y_V = np.full(padded, NEVER, np.float32), np.empty(padded, np.float32)
    for i in range(size):
        z_V[i] = _ordered(logits_V[i])
    best = z_V[_greedy(z_V)]
    if best == NEVER:
        return 0
    for i in range(padded):
        y_V[i] = (z_V[i] - best) / temperature
    if 0 < top_k < size or top_p < 1 or min_p > 0:
        kept_V = np.empty(size, np.int64)
        _keep(z_V[:size], y_V[:size], kept_V, top_k, top_p, min_p)
        for i in range(size):
            if not kept_V[i]:
                y_V[i] = NEVER
    _uniform(key, z_V)
    for i in range(0, padded, LANES):
        store8(z_V, i, add8(load8(y_V, i), _gumbel8(load8(z_V, i))))
    return _greedy(z_V)


@kernel(parallel=True)
def _sample(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, choice_R, position_R, out_R):
    for row in prange(logits_RV.shape[0]):
        if temperature_R[row] > 0:
            key = _row_key(seed_R[row], choice_R[row], position_R[row])
            out_R[row] = _draw(logits_RV[row], temperature_R[row], top_k_R[row], top_p_R[row], min_p_R[row], key)
        else:
            out_R[row] = _greedy(logits_RV[row])


def sample(
    logits_RV: np.ndarray,
    temperature_R: np.ndarray,
    top_k_R: np.ndarray,
    top_p_R: np.ndarray,
    min_p_R: np.ndarray,
    seed_R: np.ndarray,
    choice_R: np.ndarray,
    position_R: np.ndarray,
    out_R: np.ndarray,
) -> None:
    """See `Ops.sample`. logits are C-contiguous fp32; out is int64; the parameters may have any width."""
    real = (np.ascontiguousarray(x, np.float32) for x in (top_p_R, min_p_R))
    whole = [np.ascontiguousarray(x, np.int64) for x in (top_k_R, seed_R, choice_R, position_R)]
    _sample(logits_RV, np.ascontiguousarray(temperature_R, np.float32), whole[0], *real, *whole[1:], out_R)
