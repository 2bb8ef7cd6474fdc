"""The perspective function of structured sparsity in closed form, with its subgradient. Elementwise, any dtype."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Variant = Literal["exact", "paper", "authors"]


class Perspective(NamedTuple):
    """Values for each entity, all of the same shape.

    Attributes:
        z: the regulariser.
        y: the relaxed indicator ``y~`` in [0, 1].
        scale: the gradient is ``scale * w`` ...
        tip: ... plus ``tip`` times the gradient of ``max_j |w_j| / M_j``.
    """

    z: Tensor
    y: Tensor
    scale: Tensor
    tip: Tensor


def perspective(norm: Tensor, reach: Tensor, alpha: float, variant: Variant = "exact") -> Perspective:
    """The projected perspective relaxation of ``alpha ||w||^2 + (1 - alpha) [w != 0]`` with ``|w_j| <= M_j``.

    With ``s = sqrt(alpha / (1 - alpha)) ||w||`` and ``t = max_j |w_j| / M_j``, ``y~ = min(1, max(s, t))``, and

    * ``exact``: ``z = min over y in [t, 1] of alpha ||w||^2 / y + (1 - alpha) y``, attained at ``y~``;
    * ``paper``: ``z = ||w||^2 / y~ + (1 - alpha) y~``, as printed;
    * ``authors``: as ``paper``, but ``sqrt(alpha / (1 - alpha)) (1 + alpha) ||w||`` where ``t <= s < 1``, as their code
      computes; it jumps where the cases meet.

    Where ``t > 1`` (a weight beyond its bound, for which the relaxation has no value) the case ``y = 1`` is taken.
    The subgradient at ``w = 0`` is 0.

    Args:
        norm: ``||w||_2`` of each entity.
        reach: ``t`` of each entity.
        alpha: share of the quadratic term, in [0, 1].
        variant: which function.

    References:
        Cacciola, Frangioni, Li and Lodi, "Deep neural networks pruning via the structured perspective regularization"
        (SIAM Journal on Mathematics of Data Science, 2023), eq. 4 and 5.
    """
    rest = 1.0 - alpha
    ratio = (alpha / rest) ** 0.5 if rest > 0 else float("inf")
    s = torch.where(norm > 0, ratio * norm, torch.zeros_like(norm)) if ratio != 0 else torch.zeros_like(norm)
    y = torch.maximum(s, reach).clamp(max=1.0)
    nothing = norm == 0
    ridge, last = (s >= 1) | (reach >= 1), s < reach
    quadratic = alpha if variant == "exact" else 1.0
    slope = 0.0 if ratio in (0.0, float("inf")) else _slope(alpha, ratio, variant)  # 0: no entity is there
    tiny, zero = torch.finfo(norm.dtype).tiny, torch.zeros_like(norm)
    steep = norm / reach.clamp(min=tiny)
    z = torch.where(last, quadratic * norm * steep + rest * reach, slope * norm)
    scale = torch.where(last, 2 * quadratic / reach.clamp(min=tiny), slope / norm.clamp(min=tiny))
    tip = torch.where(last, rest - quadratic * steep.square(), zero)
    z = torch.where(ridge, quadratic * norm.square() + rest, z)
    scale = torch.where(ridge, zero + 2 * quadratic, scale)
    tip = torch.where(ridge, zero, tip)
    return Perspective(*(torch.where(nothing, zero, v) for v in (z, y, scale, tip)))


def _slope(alpha: float, ratio: float, variant: Variant) -> float:
    """``z / ||w||`` where ``y~ = s``."""
    if variant == "exact":
        return float(2 * (alpha * (1 - alpha)) ** 0.5)
    return (1 + alpha) / ratio if variant == "paper" else (1 + alpha) * ratio
