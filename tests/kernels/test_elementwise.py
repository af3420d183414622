"""The row-wise operations: close to the reference, and every row the same bits alone as in a batch."""

import pytest
import torch
from torch import Tensor

from headrace.kernels.cpu import CpuOps
from headrace.kernels.reference import ReferenceOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 8, 20, 64, 172)


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps()


@pytest.fixture(scope="module")
def reference() -> ReferenceOps:
    return ReferenceOps()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_embedding_is_exact(ops, reference, width, dtype):
    table, ids = normal(50, width).to(dtype), torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.embedding(ids, table), reference.embedding(ids, table))
    assert torch.equal(ops.embedding(ids.int(), table), reference.embedding(ids, table))


@pytest.mark.parametrize("bad", [-1, 50])
def test_an_unknown_id_is_refused(ops, bad):
    with pytest.raises(IndexError, match=str(bad)):
        ops.embedding(torch.tensor([3, bad]), normal(50, 8))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5, 700])
def test_norms(ops, reference, rows, width):
    x, residual, weight = normal(rows, width), normal(rows, width, seed=1), normal(width, seed=2)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))
    row = rows // 2
    assert torch.equal(ops.rms_norm(x[row : row + 1].contiguous(), weight, 1e-5)[0], ops.rms_norm(x, weight, 1e-5)[row])


@pytest.mark.parametrize("dim", [2, 6, 16, 20, 64])
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_rotary(ops, reference, rows, dim):
    """Queries and keys are views into one fused product, as in the model."""
    fused, table, weight = normal(rows, 9, dim), normal(40, dim, seed=1), normal(dim, seed=2)
    positions = torch.arange(rows) % 40
    for view in (fused[:, :5], fused[:, 5:7], fused):
        for arguments in ((), (weight, 1e-6)):
            got = ops.rotary(view, positions, table, *arguments)
            assert got.is_contiguous()
            assert_close(got, reference.rotary(view, positions, table, *arguments))
            row = rows // 2
            alone = ops.rotary(view[row : row + 1], positions[row : row + 1], table, *arguments)
            assert torch.equal(alone[0], got[row])


@pytest.mark.parametrize("bad", [-1, 40])
def test_a_position_past_the_table_is_refused(ops, bad):
    with pytest.raises(IndexError, match=str(bad)):
        ops.rotary(normal(1, 2, 8), torch.tensor([bad]), normal(40, 8))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_silu_mul(ops, reference, rows, width):
    gate_up = normal(rows, 2 * width) * 8
    got = ops.silu_mul(gate_up)
    assert_close(got, reference.silu_mul(gate_up))
    assert torch.equal(got[-1], ops.silu_mul(gate_up[-1:].contiguous())[0])


def test_silu_of_extremes(ops):
    gate = torch.tensor([[-1e9, -200.0, -88.0, -0.0, 0.0, 100.0, 1e9, torch.nan]])
    got = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert_close(got[:, :-1], torch.nn.functional.silu(gate)[:, :-1])
    assert got[0, -1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 8, 20])
@pytest.mark.parametrize("rows", [1, 100])
def test_store_kv(ops, reference, rows, dim, dtype):
    fused = normal(rows, 7, dim) * 100
    fused[0, 0, 0], fused[0, 3, 1] = torch.nan, torch.inf
    slots = (torch.randperm(160, generator=torch.Generator().manual_seed(1))[:rows]).int()
    slots[rows // 2] = -1 if rows > 1 else slots[0]
    got, want = (torch.zeros(20, 3, 2, 3, 8, dim, dtype=dtype) for _ in range(2))
    ops.store_kv_(fused[:, :3], fused[:, 3:6], got, 1, slots)
    reference.store_kv_(fused[:, :3], fused[:, 3:6], want, 1, slots)
    torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
    assert (got[:, [0, 2]] == 0).all()


def test_a_slot_past_the_cache_is_refused(ops):
    with pytest.raises(IndexError, match="160"):
        ops.store_kv_(normal(1, 1, 8), normal(1, 1, 8), torch.zeros(20, 1, 2, 1, 8, 8), 0, torch.tensor([160]))


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_past_the_cache_is_refused(ops, layer):
    with pytest.raises(IndexError, match="layer"):
        ops.store_kv_(normal(1, 1, 8), normal(1, 1, 8), torch.zeros(20, 3, 2, 1, 8, 8), layer, torch.tensor([1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks(ops, dtype):
    source, target = normal(6, 2, 2, 1, 4, 8).to(dtype), torch.zeros(4, 2, 2, 1, 4, 8, dtype=dtype)
    ops.copy_blocks_(source, target, [(5, 0), (1, 3), (2, 3)])
    assert torch.equal(target[0], source[5]) and torch.equal(target[3], source[2]) and not target[1:3].any()
    kept = source.clone()
    ops.copy_blocks_(source, source, [(0, 1), (1, 2)])
    assert torch.equal(source[1], kept[0]) and torch.equal(source[2], kept[0])
    with pytest.raises(IndexError):
        ops.copy_blocks_(source, target, [(0, -1)])
    with pytest.raises(ValueError, match="fit"):
        ops.copy_blocks_(source, target[:, :1].contiguous(), [(0, 1)])


def test_edits_are_done_in_order(ops, reference):
    rows, ids = torch.tensor([0, 0, 3, 4]), torch.tensor([5, 5, 76, 0])
    divide, add = torch.tensor([2.0, 3.0, 1.0, 1.5]), torch.tensor([-5.0, 1.0, -torch.inf, 0.25])
    got, want = normal(5, 77), normal(5, 77)
    ops.edit_logits_(got, rows, ids, divide, add)
    reference.edit_logits_(want, rows, ids, divide, add)
    assert torch.equal(got, want) and got[3, 76] == -torch.inf


@pytest.mark.parametrize("row,token", [(5, 0), (-1, 0), (0, 77), (0, -1)])
def test_an_edit_outside_the_logits_is_refused(ops, row, token):
    logits = normal(5, 77)
    before = logits.clone()
    with pytest.raises(IndexError, match=f"row {row}, token {token}"):
        ops.edit_logits_(logits, torch.tensor([0, row]), torch.tensor([0, token]), torch.ones(2), torch.ones(2))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_masks(ops, reference, words):
    """A mask may be shorter than the vocabulary (the rest is banned) or longer (padding)."""
    mask = torch.randint(-(2**31), 2**31, (3, words), generator=torch.Generator().manual_seed(0)).int()
    mask[1] = -1
    got, want = normal(5, 77), normal(5, 77)
    ops.mask_logits_(got, torch.tensor([4, 0, 2]), mask)
    reference.mask_logits_(want, torch.tensor([4, 0, 2]), mask)
    assert torch.equal(got, want)
    with pytest.raises(IndexError, match="row 5"):
        ops.mask_logits_(got, torch.tensor([5]), mask[:1])


def test_threads_change_no_bits():
    one, two = CpuOps(threads=1), CpuOps(threads=2)
    x, weight, positions = normal(301, 200), normal(200, seed=1), torch.arange(301)
    table, heads = normal(301, 20, seed=2), normal(301, 10, 20, seed=3)
    blocks = [torch.zeros(40, 1, 2, 10, 8, 20, dtype=torch.bfloat16) for _ in range(2)]
    for ops, cache in zip((one, two), blocks):
        ops.store_kv_(heads, heads, cache, 0, positions.int())
    assert torch.equal(*blocks)
    for run in (
        lambda ops: ops.rms_norm(x, weight, 1e-6),
        lambda ops: torch.cat(ops.add_rms_norm(x, x, weight, 1e-6)),
        lambda ops: ops.silu_mul(x),
        lambda ops: ops.rotary(heads, positions, table, weight[:20], 1e-6),
        lambda ops: ops.embedding(positions, x),
    ):
        assert torch.equal(run(one), run(two))


def test_no_rows(ops):
    none = torch.empty(0, 16)
    assert ops.rms_norm(none, torch.ones(16), 1e-6).shape == ops.add_rms_norm(none, none, torch.ones(16), 1e-6)[0].shape
    assert ops.silu_mul(none).shape == (0, 8)
    assert ops.embedding(torch.empty(0, dtype=torch.int64), torch.ones(4, 16)).shape == (0, 16)
