"""``nn.MultiheadAttention`` whose heads, or the dimensions of each, are fewer than its width gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.graph.channels import BoolArray, ChannelGraph


@dataclass(frozen=True)
class HeadSizes:
    """What is left of the heads of an attention.

    Attributes:
        heads: kept heads.
        keys: kept dimensions of queries and keys in each.
        values: kept dimensions of values in each.
        scale: of the scores, ``1 / sqrt(d)`` of the dense network's d.
    """

    heads: int
    keys: int
    values: int
    scale: float


class SlimAttention(nn.MultiheadAttention):
    """Multi-head attention with any number of heads, any size of keys and values, and a scale of its own.

    Arguments and results of ``forward``, names of parameters and everything else are as of ``nn.MultiheadAttention``;
    ``in_proj_weight`` holds ``heads * keys`` rows for queries, as many for keys, and ``heads * values`` for values.
    PyTorch's fused encoder layer, which knows one width only, does not take it.

    Attributes:
        num_heads: kept heads.
        head_dim: dimensions of queries and keys in each.
        value_dim: dimensions of values in each.
        scale: of the scores.
    """

    value_dim: int
    scale: float

    @classmethod
    def take_over(cls, attention: nn.MultiheadAttention, sizes: HeadSizes) -> SlimAttention:
        """Turn an attention whose parameters are cut into a slim one, in place; hooks and mode stay.

        Args:
            attention: of exactly the class of PyTorch.
            sizes: what its parameters hold.
        """
        attention.__class__ = cls
        slim = cast(SlimAttention, attention)
        slim.num_heads, slim.head_dim, slim.value_dim = sizes.heads, sizes.keys, sizes.values
        slim.scale = sizes.scale
        slim._qkv_same_embed_dim = False  # an encoder layer then leaves its fused path alone
        out = slim.out_proj
        out.out_features, out.in_features = out.weight.shape
        slim.embed_dim = slim._weights()[0].shape[1]
        slim.kdim, slim.vdim = (w.shape[1] for w in slim._weights()[1:])
        return slim

    @property
    def _rows(self) -> list[int]:
        """Rows of queries, keys and values in a packed projection."""
        return [self.num_heads * n for n in (self.head_dim, self.head_dim, self.value_dim)]

    def _weights(self) -> Sequence[Tensor]:
        packed = cast("Tensor | None", self.in_proj_weight)
        if packed is None:
            return cast("tuple[Tensor, ...]", (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        return torch.split_with_sizes(packed, self._rows)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Raises:
            RuntimeError: ``is_causal`` without the mask that it is a hint for.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that attn_mask is causal: give the mask as well")
        batched, first = query.dim() == 3, self.batch_first
        hint = is_causal and key_padding_mask is None and not need_weights
        # Laid out as PyTorch's own, tokens first: each of its products then has the same rows as each of these.
        inputs = {id(x): _tokens_first(x, batched=batched, first=first) for x in (query, key, value)}
        laid = (inputs[id(x)] for x in (query, key, value))
        q, k, v = (self._in_heads(x) for x in self._projected(*laid))
        mask = None if hint else self._mask(attn_mask, key_padding_mask, q)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (self._extended(x, b) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = torch.matmul(q * self.scale, k.transpose(-2, -1))
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = torch.matmul(weights, v)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint, scale=self.scale)
        y = y.permute(2, 0, 1, 3).flatten(-2)
        y = F.linear(y.flatten(0, 1), self.out_proj.weight, self.out_proj.bias).reshape(*y.shape[:2], -1)
        if not batched:
            return y[:, 0], None if weights is None else weights[0]
        return (y.transpose(0, 1) if first else y), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, all heads of each in the last dimension."""
        packed, bias = cast("Tensor | None", self.in_proj_weight), cast("Tensor | None", self.in_proj_bias)
        if packed is not None and query is key and key is value:
            return torch.split_with_sizes(F.linear(query, packed, bias), self._rows, -1)
        biases: Sequence[Tensor | None] = [None, None, None]
        if bias is not None:
            biases = torch.split_with_sizes(bias, self._rows)
        inputs = zip((query, key, value), self._weights(), biases, strict=True)
        return [F.linear(x, w, b) for x, w, b in inputs]

    def _in_heads(self, x: Tensor) -> Tensor:
        """``(N, heads, tokens, dimensions)`` of ``(tokens, N, features)``."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1).permute(1, 2, 0, 3)

    def _extended(self, x: Tensor, bias: Tensor) -> Tensor:
        """One more token, the same for all samples."""
        token = bias.reshape(1, self.num_heads, 1, -1)
        return torch.cat([x, token.expand(x.shape[0], -1, -1, -1)], 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, ``(N or 1, heads or 1, queries or 1, keys)``; None for nothing."""
        found = []
        if attention is not None:
            shape = (-1, self.num_heads, *attention.shape[-2:])
            found.append(attention[None, None] if attention.dim() == 2 else attention.reshape(shape))
        if padding is not None:
            found.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
        terms = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m
            for m in found
        ]
        return sum(terms[1:], terms[0]) if terms else None

    def extra_repr(self) -> str:
        """Heads and their sizes."""
        return (
            f"heads={self.num_heads}, keys={self.head_dim}, values={self.value_dim}, scale={self.scale:.4g}"
        )


def _tokens_first(x: Tensor, *, batched: bool, first: bool) -> Tensor:
    """``(tokens, N, features)``."""
    if not batched:
        return x[:, None]
    return x.transpose(0, 1) if first else x


def slim_attentions(model: nn.Module, graph: ChannelGraph, flat: BoolArray) -> None:
    """Turn every ``nn.MultiheadAttention`` that lost something into a ``SlimAttention``, in place.

    One of which no whole heads or dimensions of all heads went is left: its own ``forward`` then says that it does
    not fit, and the graph is rewritten.

    Args:
        model: after its parameters were cut.
        graph: of the dense network.
        flat: ``(unit_count,) bool``.
    """
    masks = {
        name: _masks(graph, spec.axes, flat) for spec in graph.tensors for name in (spec.name, *spec.aliases)
    }
    for path, module in list(model.named_modules()):
        if type(module) is not nn.MultiheadAttention:
            continue
        prefix = f"{path}." if path else ""
        own = {name: masks.get(prefix + name, []) for name, _ in module.named_parameters()}
        if all(m is None or m.all() for dims in own.values() for m in dims):
            continue
        sizes = _sizes(module, own)
        if sizes is not None:
            SlimAttention.take_over(module, sizes)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, SlimAttention) for m in module.modules()
        ):
            module.use_nested_tensor = False  # it asks for this once, when it is made


def _masks(graph: ChannelGraph, axes: tuple[int | None, ...], flat: BoolArray) -> list[BoolArray | None]:
    return [None if axis is None else flat[graph.axes[axis]] for axis in axes]


def _sizes(module: nn.MultiheadAttention, masks: dict[str, list[BoolArray | None]]) -> HeadSizes | None:
    """What is left of queries, keys and values; None where that is no rectangle of heads and dimensions."""
    heads, size = module.num_heads, module.head_dim
    packed = masks.get("in_proj_weight")
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    dims = [packed] if packed is not None else [masks[name] for name in names]
    rows = np.concatenate(
        [np.ones(heads * size * 3 // len(dims), np.bool_) if not d or d[0] is None else d[0] for d in dims]
    ).reshape(3, heads, size)
    kept, inner = np.asarray(rows.any(2)), np.asarray(rows.any(1))
    if not (rows == kept[:, :, None] & inner[:, None]).all() or not (kept == kept[0]).all():
        return None
    if not (inner[0] == inner[1]).all():
        return None
    return HeadSizes(int(kept[0].sum()), int(inner[0].sum()), int(inner[2].sum()), 1 / math.sqrt(size))
