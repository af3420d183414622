"""`ReferenceOps`: every operation in plain torch, as its definition reads. Honest and simple, not fast.

It is what the Numba kernels are compared with, and the first backend on a GPU. Rows are *not* bit-identical
across batches here: torch's matrix products choose their reduction by shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.base import BaseOps
from headrace.kernels.dropout import dropout_bar, signed64
from headrace.kernels.ops import AttentionMeta, SampleParams
from headrace.kernels.panels import Weight, rows_of
from headrace.kernels.partials import Partials
from headrace.kernels.reference import attention
from headrace.kernels.reference import sample as sampling
from headrace.kernels.shards import Span, tree

__all__ = ["ReferenceOps"]


class ReferenceOps(BaseOps):
    """`headrace.kernels.training.TrainingOps` in torch, on `device`."""

    name = "reference"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def fingerprint(self) -> str:
        """Implementation, torch's version and the device; torch fixes no reduction order beyond that."""
        cuda = self.device.type == "cuda"
        place = torch.cuda.get_device_name(self.device) if cuda else torch.backends.cpu.get_cpu_capability()
        return f"reference/torch-{torch.__version__}/{place}"

    def warm_up(
        self,
        weights: torch.dtype = torch.float32,
        cache: torch.dtype = torch.float32,
        progress: Callable[[int, int, str], None] | None = None,
        training: bool = False,
        one_call: bool = False,
    ) -> None:
        """Nothing is compiled here."""

    def embedding(self, ids_T: Tensor, table_VD: Weight) -> Tensor:
        rows_VD = rows_of(table_VD)
        return rows_VD[ids_T.to(rows_VD.device, torch.int64)].float()

    def linear(
        self, x_TK: Tensor, weight_NK: Weight, bias_N: Tensor | None = None, bounds: Sequence[int] | None = None
    ) -> Tensor:
        cuts = (0, x_TK.shape[-1]) if bounds is None else tuple(bounds)
        rows_NK = rows_of(weight_NK)
        y_TN = tree([F.linear(x_TK[..., a:b], rows_NK[:, a:b].float()) for a, b in pairwise(cuts)])
        return y_TN if bias_N is None else y_TN + bias_N.float()

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = x_TD.float()
        return x_TD * torch.rsqrt(x_TD.square().mean(dim=-1, keepdim=True) + eps) * weight_D.float()

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD + residual_TD
        return self.rms_norm(sum_TD, weight_D, eps), sum_TD

    def rotary(
        self, x_THd: Tensor, positions_T: Tensor, table_Pd: Tensor, weight_d: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        if weight_d is not None:
            x_THd = self.rms_norm(x_THd, weight_d, eps)
        angles_T1d = table_Pd[positions_T.to(table_Pd.device, torch.int64)].unsqueeze(1)
        cos, sin = angles_T1d.chunk(2, dim=-1)
        low, high = x_THd.float().chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def silu_mul(self, gate_up_TI: Tensor) -> Tensor:
        gate, up = gate_up_TI.chunk(2, dim=-1)
        return F.silu(gate) * up

    def store_kv_(self, k_TGd: Tensor, v_TGd: Tensor, blocks: Tensor, layer: int, slots_T: Tensor) -> None:
        slots_T = slots_T.to(blocks.device, torch.int64)
        rows_T = (slots_T >= 0).nonzero().squeeze(1)
        slots_T = slots_T[rows_T]
        size = blocks.shape[4]
        for part, x_TGd in enumerate((k_TGd, v_TGd)):
            blocks[slots_T // size, layer, part, :, slots_T % size] = x_TGd[rows_T].to(blocks.dtype)

    def attention(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        contexts_S = meta.context_len_S.cpu()
        whole_S2 = torch.stack((torch.zeros_like(contexts_S), contexts_S), dim=1)
        parts = self.attention_partials(q_THd, blocks, layer, meta, scale, whole_S2, window)
        return self.fold_partials([parts], [whole_S2], meta, window, lse_TH)

    def attention_partials(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        range_S2: Tensor,
        window: int = 0,
    ) -> Partials:
        return attention.attention_partials(q_THd, blocks, layer, meta, scale, range_S2, window)

    def fold_partials(
        self,
        parts: Sequence[Partials],
        ranges: Sequence[Tensor],
        meta: AttentionMeta,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        return attention.fold_partials(parts, ranges, meta, window, lse_TH)

    def logsumexp_parts(self, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        parts = []
        for a, b in pairwise(bounds):
            z = F.pad(logits_RV[:, a:b].float(), (0, 1), value=-torch.inf)  # an empty shard has a maximum too
            m_R = z.amax(dim=1)
            parts.append(torch.stack((m_R, torch.exp(z - _shift(m_R)[:, None]).sum(dim=1)), dim=1))
        return torch.stack(parts, dim=1)

    def merge_logsumexp(self, parts_RS2: Tensor) -> Tensor:
        m_RS, e_RS = parts_RS2.unbind(dim=2)
        while m_RS.shape[1] > 1:
            best_RS = torch.maximum(m_RS[:, ::2], m_RS[:, 1::2])
            shift_RS = _shift(best_RS)
            e_RS = e_RS[:, ::2] * torch.exp(m_RS[:, ::2] - shift_RS) + e_RS[:, 1::2] * torch.exp(
                m_RS[:, 1::2] - shift_RS
            )
            m_RS = best_RS
        return m_RS[:, 0] + torch.log(e_RS[:, 0])

    def score(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        target_R1 = targets_R.to(logits_RV.device, torch.int64)[:, None]
        z_RV = sampling.ordered(logits_RV)
        own_R1 = z_RV.gather(1, target_R1)
        ids_V = torch.arange(z_RV.shape[1], device=z_RV.device)
        before_RV = (z_RV > own_R1) | ((z_RV == own_R1) & (ids_V < target_R1))
        return _logprob(own_R1, lse_R)[:, 0], (before_RV.sum(dim=1) + 1).to(torch.int32)

    def top_logprobs(self, logits_RV: Tensor, lse_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = sampling.ordered(logits_RV).sort(dim=1, descending=True, stable=True)
        return _logprob(best.values[:, :k], lse_R), best.indices[:, :k].to(torch.int32)

    def edit_logits_(self, logits_RV: Tensor, rows_E: Tensor, ids_E: Tensor, divide_E: Tensor, add_E: Tensor) -> None:
        device = logits_RV.device
        rows_E, ids_E = rows_E.to(device, torch.int64), ids_E.to(device, torch.int64)
        divide_E, add_E = divide_E.to(device, torch.float32), add_E.to(device, torch.float32)
        for round_ in _rounds(rows_E * logits_RV.shape[1] + ids_E):
            at = (rows_E[round_], ids_E[round_])
            z, divide = logits_RV[at], divide_E[round_]
            logits_RV[at] = torch.where(z > 0, z / divide, z * divide) + add_E[round_]

    def mask_logits_(self, logits_RV: Tensor, rows_E: Tensor, mask_EW: Tensor) -> None:
        device, vocab_size = logits_RV.device, logits_RV.shape[1]
        bits_EV = ((mask_EW.to(device)[:, :, None] >> torch.arange(32, device=device)) & 1).flatten(1)
        banned_EV = F.pad(1 - bits_EV, (0, max(0, vocab_size - bits_EV.shape[1])), value=1)[:, :vocab_size]
        bans_RV = torch.zeros(logits_RV.shape, dtype=banned_EV.dtype, device=device)
        bans_RV.index_add_(0, rows_E.to(device, torch.int64), banned_EV)
        logits_RV.masked_fill_(bans_RV > 0, -torch.inf)

    def sample(self, logits_RV: Tensor, params: SampleParams) -> Tensor:
        return sampling.sample(logits_RV, params)

    def copy_blocks_(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        for i, j in pairs:
            target[j].copy_(source[i])

    # ---- what training adds ------------------------------------------------------------------------------------

    def rms_norm_backward(
        self, g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, bounds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        r_T1 = torch.rsqrt(x_TD.square().mean(dim=-1, keepdim=True) + eps)
        normed_TD = x_TD * r_T1
        g_normed_TD = g_TD * weight_D.float()
        along_T1 = (g_normed_TD * normed_TD).mean(dim=-1, keepdim=True)
        g_weight_TD = (g_TD * normed_TD).flatten(0, -2)
        return (
            (g_normed_TD - normed_TD * along_T1) * r_T1,
            torch.stack([g_weight_TD[a:b].sum(dim=0) for a, b in pairwise(bounds)]),
        )

    def linear_backward_input(self, g_TN: Tensor, weight_NK: Tensor, spans: Sequence[Span]) -> Tensor:
        parts: dict[int, Tensor] = {}
        for shard, column, row, count in spans:
            part = g_TN[:, column : column + count] @ weight_NK[row : row + count].float()
            parts[shard] = parts[shard] + part if shard in parts else part
        return tree(list(parts.values()))

    def linear_backward_weight(self, g_TN: Tensor, x_TK: Tensor, into_NK: Tensor | None = None) -> Tensor:
        return g_TN.mT @ x_TK if into_NK is None else into_NK.addmm_(g_TN.mT, x_TK)

    def attention_backward(
        self,
        g_THd: Tensor,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        out_THd: Tensor,
        lse_TH: Tensor,
        query_start_S1: Tensor,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q_THd), torch.empty(k_TGd.shape).to(k_TGd), torch.empty(v_TGd.shape).to(v_TGd)
        groups = k_TGd.shape[1]
        own_TH = (g_THd * out_THd).sum(-1)
        for start, stop in pairwise(query_start_S1.tolist()):
            rows = slice(start, stop)
            g, q = (x[rows].transpose(0, 1).unflatten(0, (groups, -1)) for x in (g_THd, q_THd))
            k, v = (x[rows].transpose(0, 1).unsqueeze(1) for x in (k_TGd, v_TGd))
            lse, own = (x[rows].T.unflatten(0, (groups, -1))[..., None] for x in (lse_TH, own_TH))
            seen_IJ = attention.visible(range(stop - start), range(stop - start), window, self.device)
            p = torch.exp(q @ k.mT * scale - lse).masked_fill(~seen_IJ, 0.0)
            s = scale * p * (g @ v.mT - own)
            parts = (s @ k).flatten(0, 1), (s.mT @ q).sum(1), (p.mT @ g).sum(1)
            for grad, part in zip(grads, parts):
                grad[rows] = part.transpose(0, 1)
        return grads

    def silu_mul_backward(self, g_TI: Tensor, gate_up_T2I: Tensor) -> Tensor:
        gate, up = gate_up_T2I.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        return torch.cat((g_TI * up * (sigmoid + silu * (1 - sigmoid)), g_TI * silu), dim=-1)

    def cross_entropy_backward_(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor, g_R: Tensor) -> None:
        ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
        hit_RV = targets_R.to(logits_RV.device)[:, None] == ids_V
        logits_RV.copy_(g_R[:, None] * (hit_RV.float() - torch.exp(logits_RV - lse_R[:, None])))

    def adamw_(
        self,
        master: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        stored: Tensor | None,
        *,
        rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        step: int,
        scale: float,
    ) -> None:
        g = grad.float() * scale
        first.add_((1 - beta1) * (g - first))
        second.mul_(beta2).add_((1 - beta2) * g * g)
        under = second.sqrt() / math.sqrt(1 - beta2**step) + eps
        master.mul_(1 - rate * decay).sub_(rate / (1 - beta1**step) * first / under)
        if stored is not None:
            stored.copy_(master)

    def sum_of_squares(self, flat: Tensor, chunk: int) -> Tensor:
        return F.pad(flat, (0, -flat.numel() % chunk)).view(-1, chunk).double().square().sum(dim=1)

    def dropout(self, x_TD: Tensor, key: int, row_T: Tensor, first_feature: int, rate: float) -> Tensor:
        bar = dropout_bar(rate)
        if rate == 0:
            return x_TD
        keep_TD = sampling.kept(signed64(key), row_T.to(x_TD.device), first_feature, x_TD.shape[1], bar)
        return torch.where(keep_TD, x_TD * (1 / (1 - rate)), 0.0)


def _shift(m: Tensor) -> Tensor:
    """A maximum that may be subtracted: 0 where it is -inf."""
    return torch.where(m == -torch.inf, 0.0, m)


def _logprob(z_RN: Tensor, lse_R: Tensor) -> Tensor:
    """z − lse, where a banned token is -inf even in a row of nothing else."""
    return torch.where(z_RN == -torch.inf, -torch.inf, z_RN - lse_R[:, None])


def _rounds(keys_E: Tensor) -> list[Tensor]:
    """Indices in rounds: the i-th has every key's i-th occurrence, so edits of one token stay in order."""
    if keys_E.numel() == 0:
        return []
    ranked = keys_E.sort(stable=True)
    _, counts = torch.unique_consecutive(ranked.values, return_counts=True)
    start_E = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    occurrence_E = torch.arange(keys_E.numel(), device=keys_E.device) - start_E
    return [ranked.indices[occurrence_E == i] for i in range(int(counts.max()))]
