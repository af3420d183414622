"""The model: one decoder-only transformer, which trains and serves.

It is `embed`, `blocks[i:j]` and `head`, so a pipeline stage is a slice. Attention is `ctx.attend`; caches, batches,
sharding and quantization are elsewhere. Between blocks the residual stream is passed as (x, residual), the last
output and the sum before it, so that the addition is fused into the next norm.

    T tokens, those of all sequences in a row   R rows with logits   D hidden   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from headrace.attention.context import AttentionContext
from headrace.config import ModelConfig
from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import Layers, Ops
from headrace.model.layers import Attention, GatedMLP, RMSNorm, weight_dtype
from headrace.model.rotary import rotary_table
from headrace.parallel.group import RankGroup
from headrace.parallel.pieces import Piece, Streams
from headrace.parallel.tensor import LMHead, VocabParallelEmbedding

__all__ = ["Block", "Part", "Transformer"]

MLPFactory = Callable[[ModelConfig, Ops, int, RankGroup], GatedMLP]
"""(config, ops, layer, group) → that layer's feed-forward part."""


class Part(Protocol):
    """A module with weights of its own: the embedding, a block, the last norm, the head."""

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Normal weights; `out_std` is that of projections back into the residual stream."""
        ...

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, piece) of every tensor, to be read or filled."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(
        self, config: ModelConfig, ops: Ops, layer: int, rope_Pd: Tensor, mlp: MLPFactory, group: RankGroup
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, group)
        self.attention = Attention(config, ops, layer, rope_Pd, group)
        self.mlp_norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, group)
        self.mlp = mlp(config, ops, layer, group)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, positions_T: Tensor, ctx: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) → (x, residual); `residual` is None before the first block."""
        x_TD, residual_TD = self.input_norm(x_TD, residual_TD)
        x_TD = self.attention(x_TD, positions_T, ctx)
        x_TD, residual_TD = self.mlp_norm(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD

    def weights(self, window: int) -> LayerWeights | None:
        """What the block computes with; None where it computes something that `Ops.layers` does not know."""
        attention, mlp = self.attention, self.mlp
        linears = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
        if type(mlp) is not GatedMLP or not all(linear.plain for linear in linears):
            return None
        ranks = attention.out.group.size > 1
        (qkv, qkv_bias), (out, out_bias), (gate_up, gate_up_bias), (down, down_bias) = (
            (linear.weight, linear.bias) for linear in linears
        )
        return LayerWeights(
            self.input_norm.weight,
            qkv,
            qkv_bias,
            attention.q_norm,
            attention.k_norm,
            out,
            None if ranks else out_bias,
            self.mlp_norm.weight,
            gate_up,
            gate_up_bias,
            down,
            None if ranks else down_bias,
            window,
            (attention.out.over_ranks, mlp.down.over_ranks) if ranks else None,
        )

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Normal weights; `out_std` is that of the two projections back into the residual stream."""
        self.attention.init_(streams, std, out_std)
        self.mlp.init_(streams, std, out_std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, piece) of every tensor, to be read or filled."""
        yield from self.input_norm.tensors(f"{prefix}input_layernorm")
        yield from self.attention.tensors(f"{prefix}self_attn.")
        yield from self.mlp_norm.tensors(f"{prefix}post_attention_layernorm")
        yield from self.mlp.tensors(f"{prefix}mlp.")


class Transformer(nn.Module):
    """A dense decoder of the shape and family in `config`, computed by `ops`.

    Matrices are stored in `config.dtype`, norms and biases in fp32, on the ops' device. They start
    uninitialised: `init_weights` or `headrace.model.huggingface.load_model` fills them.
    """

    def __init__(
        self, config: ModelConfig, ops: Ops, mlp: MLPFactory = GatedMLP, group: RankGroup | None = None
    ) -> None:
        """`group`: the ranks that hold the model together; None means this rank alone."""
        super().__init__()
        self.config = config
        self.ops = ops
        self._mlp = mlp
        self.opening: Callable[[Part], AbstractContextManager[None]] = lambda part: nullcontext()
        """A context within which a part's weights are whole. `zero.Sharded` replaces it where it divides them."""
        self.group = group = RankGroup() if group is None else group
        self.rope_Pd = rotary_table(config, ops.device)
        dtype = weight_dtype(config)
        self.embed = VocabParallelEmbedding(ops, config.vocab_size, config.hidden_size, config.shards, dtype, group)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config, ops, layer, self.rope_Pd, mlp, group) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, group)
        self.lm_head = LMHead(
            ops,
            config.vocab_size,
            config.hidden_size,
            config.shards,
            dtype,
            group,
            tied=self.embed if config.tie_word_embeddings else None,
        )

    @property
    def kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.blocks[0].attention.qkv.split[1]

    @property
    def vocab_bounds(self) -> tuple[int, ...]:
        """Offsets of the vocabulary's shards, for `Ops.logsumexp` of the logits."""
        return self.lm_head.bounds

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext, rows_R: Tensor | None = None
    ) -> Tensor:
        """Logits [R, V] fp32 of the rows `rows_R` (None: of all T; may be empty).

        V is this rank's part of the vocabulary; `lm_head.gather` concatenates the parts.
        """
        return self.head(*self._trunk(ids_T, positions_T, ctx), rows_R)

    def hidden(self, ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext) -> Tensor:
        """The input of the LM head: the last norm's output [T, D] fp32 of every row."""
        return self.lm_head.enter(self.norm(*self._trunk(ids_T, positions_T, ctx))[0])

    def layers(self) -> Layers | None:
        """All blocks over a paged cache as one call, where the ops have one for what this model computes.

        With several ranks it is a call for each half of a block, and an exchange after each.
        """
        config, first = self.config, self.blocks[0]
        weights = [block.weights(config.window(layer)) for layer, block in enumerate(self.blocks)]
        if not all(weights):
            return None
        form = LayerForm(
            config.hidden_size,
            *first.attention.qkv.split[:2],
            config.head_dim,
            first.mlp.down.own_bounds[-1],
            config.rms_norm_eps,
            first.attention.out.own_bounds,
            first.mlp.down.own_bounds,
            self.rope_Pd,
        )
        return self.ops.layers(form, [block for block in weights if block is not None])

    def _trunk(self, ids_T: Tensor, positions_T: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor | None]:
        x_TD = self.embed(ids_T)
        if ctx.layers is not None:
            return ctx.layers(x_TD, positions_T)
        residual_TD = None
        for block in self.blocks:
            x_TD, residual_TD = block(x_TD, residual_TD, positions_T, ctx)
        return x_TD, residual_TD

    def head(self, x_TD: Tensor, residual_TD: Tensor | None, rows_R: Tensor | None = None) -> Tensor:
        """The last blocks' (x, residual) → logits [R, V] fp32 of the rows `rows_R` (None: of all)."""
        if rows_R is not None:
            if rows_R.shape[0] == 0:
                return x_TD.new_empty((0, self.lm_head.stop - self.lm_head.start))
            x_TD = self.ops.embedding(rows_R, x_TD)
            residual_TD = None if residual_TD is None else self.ops.embedding(rows_R, residual_TD)
        x_RD, _ = self.norm(x_TD, residual_TD)
        logits_RV: Tensor = self.lm_head(self.lm_head.enter(x_RD))
        return logits_RV

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Normal random weights; projections into the residual stream are scaled by 1/√(2·layers)."""
        streams = Streams(seed, self.config.shards, self.group)
        out_std = std * (2 * self.config.num_layers) ** -0.5
        for _, part in self.parts():
            with self.opening(part):
                part.init_(streams, std, out_std)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """(prefix of its checkpoint names, part) of everything that has weights, in the order of forward."""
        yield "model.embed_tokens", self.embed
        for layer, block in enumerate(self.blocks):
            yield f"model.layers.{layer}.", block
        yield "model.norm", self.norm
        yield "lm_head", self.lm_head

    def tensors(self) -> Iterator[tuple[str, Piece]]:
        """(Hugging Face checkpoint name, this rank's piece) of every tensor, to be read or filled.

        A part's weights are whole only while its tensors are yielded (ZeRO stage 3): use each before the next.
        """
        for prefix, part in self.parts():
            with self.opening(part):
                yield from part.tensors(prefix)

    def with_ops(self, ops: Ops) -> Transformer:
        """The same weights, in the same memory, computed by other ops on the same device, without gradients.

        An engine can so sample from a model that is being trained.
        """
        twin = Transformer(self.config, ops, self._mlp, self.group)
        for theirs, ours in zip(twin.parameters(), self.parameters(), strict=True):
            theirs.data = ours.detach()
        return twin.requires_grad_(False)
