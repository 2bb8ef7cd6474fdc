"""Structured perspective regularisation: a penalty whose kinks lie where whole entities are zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.train.entities import Entities, Structure, by_unit, weights_of
from qcqp_prune.train.perspective import Perspective, Variant, perspective
from qcqp_prune.train.rows import RowSums, RowValues

Bounds = Literal["running", "fixed"] | Mapping[str, float] | nn.Module
SMALL, SHARE = 1e-4, 0.99
"""An entity counts as zero where more than this share of its weights is below this size (section 4 of the paper)."""


@dataclass(frozen=True)
class SPRConfig:
    """What the penalty is.

    Attributes:
        strength: ``lambda`` of the paper, at least 0.
        alpha: share of the quadratic term, in [0, 1].
        variant: ``exact``, ``paper`` or ``authors``; see ``perspective``.
        structure: what an entity is.
        clamp: whether weights are cut to their bound after a step; otherwise one beyond it costs what a ridge costs.

    Raises:
        InvalidOptionError: a value is outside its domain.
    """

    strength: float = 0.2
    alpha: float = 0.3
    variant: Variant = "exact"
    structure: Structure = "filters"
    clamp: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise InvalidOptionError(f"strength={self.strength!r}: give a number from 0 up")
        if not 0 <= self.alpha <= 1:
            raise InvalidOptionError(f"alpha={self.alpha!r}: give a number in [0, 1]")
        if self.variant not in get_args(Variant):
            raise InvalidOptionError(f"variant={self.variant!r}: choose from {', '.join(get_args(Variant))}")


class SPR:
    """The penalty ``strength * sum_i (u_i / sum u) z_i`` of a network, to be added to its loss.

    Call it for the value as a tensor with a gradient; call ``after_step`` after each step of the optimiser::

        spr = qp.SPR(model, graph, SPRConfig(strength=0.2, alpha=0.3))
        (loss + spr()).backward(); optimizer.step(); spr.after_step()

    Weights of one shape are stacked, so a whole network takes a few tensor operations, and the gradient is written
    down instead of traced back.

    Args:
        model: the traced network; its parameters are read at each call.
        graph: its channel graph.
        config: strength, alpha, variant, structure.
        bounds: ``M``, the largest absolute value of a weight, for each layer: ``running``, the largest seen so far;
            ``fixed``, the largest in the weights as they are now; a network of the same architecture that was trained
            without the penalty, or a number for each layer's name.
        weights: ``u_i``, ``(entities,)``, at least 0; the number of weights of each entity where None.
        layers: names or globs of the layers; all where None.

    Raises:
        InvalidOptionError: weights or bounds do not fit.
        MaskMismatchError: the model is not the one that was traced.

    References:
        Cacciola, Frangioni, Li and Lodi, "Deep neural networks pruning via the structured perspective regularization",
        section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        config: SPRConfig | None = None,
        *,
        bounds: Bounds = "running",
        weights: FloatArray | None = None,
        layers: Iterable[str] | None = None,
    ) -> None:
        self.config = SPRConfig() if config is None else config
        self.graph = graph
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        self.entities = Entities.of(graph, self.config.structure, layers, frozen=frozen)
        parameters = weights_of(model, self.entities)
        self._tensors = [parameters[b.weight] for b in self.entities.blocks]
        self._rows = RowSums(self.entities, self._tensors)
        self._running = isinstance(bounds, str) and bounds == "running"
        self._limit = _limits(self.entities, self._tensors, bounds)
        self._prices = torch.empty(0)
        sizes = self._rows.sizes.astype(np.float64)
        self.set_weights(sizes if weights is None else weights)

    def set_weights(self, weights: FloatArray) -> None:
        """Change ``u_i``, ``(entities,)``; only their proportions count.

        Raises:
            InvalidOptionError: there is another number of them, one is negative or not finite, or all are 0.
        """
        values = np.asarray(weights, np.float64)
        if values.shape != (self.entities.count,):
            raise InvalidOptionError(
                f"weights have shape {values.shape}: give one for each of the {self.entities.count} entities"
            )
        if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
            raise InvalidOptionError("weights of entities: give finite numbers from 0 up, not all 0")
        self.set_prices(self.config.strength * values / values.sum())

    @property
    def unit_of(self) -> IntArray:
        """The unit of each entity, ``(entities,)``."""
        return self.entities.unit_of

    def set_prices(self, prices: FloatArray) -> None:
        """Take ``sum_i price_i z_i`` for the penalty, whatever the strength; ``(entities,)``, at least 0."""
        reference = self._tensors[0]
        self._prices = torch.from_numpy(np.asarray(prices, np.float64)).to(reference.device, reference.dtype)

    def __call__(self) -> Tensor:
        """The penalty, a scalar tensor with a gradient towards the weights."""
        penalty: Tensor = _Penalty.apply(self, *self._tensors)  # type: ignore[no-untyped-call]
        return penalty

    @torch.no_grad()
    def after_step(self) -> None:
        """Cut weights to their bounds, where the config says so and the bounds are not running."""
        if self.config.clamp and not self._running:
            for tensor, block, limit in zip(
                self._tensors, self.entities.blocks, self._limit.tolist(), strict=True
            ):
                if limit > 0:  # what was made as zeros, such as the shifts of a fresh norm, has no bound yet
                    (tensor if block.part is None else tensor[slice(*block.part)]).clamp_(-limit, limit)

    @torch.no_grad()
    def indicators(self) -> FloatArray:
        """The relaxed indicator ``y~`` of each entity, ``(entities,)`` in [0, 1]."""
        return self._evaluated(self._tensors)[0].y.double().cpu().numpy()

    @torch.no_grad()
    def sizes(self) -> FloatArray:
        """The norm of each entity, ``(entities,)``."""
        return np.asarray(self._squares(self._rows.values(self._tensors)).sqrt().double().cpu())

    def unit_indicators(self) -> FloatArray:
        """The relaxed indicator of each unit, ``(units,)``: the largest of its entities', 1 for units without any."""
        return by_unit(self.graph, self.unit_of, self.indicators())

    @torch.no_grad()
    def zeros(self, small: float = SMALL, share: float = SHARE) -> BoolArray:
        """Which entities count as zero, ``(entities,)``: more than ``share`` of the weights are below ``small``."""
        found = self._rows.counted(self._tensors, small)
        near = found.new_zeros(self.entities.count + 1).index_add_(0, self._rows.owner, found)[:-1]
        return np.asarray(near.cpu().numpy() > share * self._rows.sizes)

    def kept_units(self, small: float = SMALL, share: float = SHARE) -> BoolArray:
        """Units with an entity that is not zero, and those without entities, ``(units,)``."""
        kept: BoolArray = by_unit(self.graph, self.unit_of, ~self.zeros(small, share)) > 0
        return kept

    def masks(self, small: float = SMALL, share: float = SHARE) -> Masks:
        """What the published rule keeps: units with an entity that is not zero, and at least one of each group."""
        keep = self.kept_units(small, share)
        worth = self.unit_indicators()
        for g, group in enumerate(self.graph.groups):
            span = self.graph.units(g)
            units = np.arange(span.start, span.stop)
            allowed = [n for n in group.counts() if n >= keep[units].sum()]
            order = units[np.lexsort((-worth[units], ~keep[units]))]
            keep[order[: allowed[0]]] = True
        return Masks.from_flat(self.graph, keep)

    def describe(self) -> dict[str, Any]:
        """Its config, what it regularises, and the graph that it was made for."""
        return {
            "kind": "spr",
            **asdict(self.config),
            "bounds": "running" if self._running else "given",
            "weights": [block.weight for block in self.entities.blocks],
            "graph": self.graph.fingerprint,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: the bounds, and the prices of the entities."""
        return {"limit": self._limit.clone(), "prices": self._prices.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._limit.copy_(state["limit"])
        self._prices.copy_(state["prices"])

    def _squares(self, rows: RowValues) -> Tensor:
        """The sum of squares of each entity."""
        sums = rows.square.new_zeros(self.entities.count + 1)
        return sums.index_add_(0, self._rows.owner, rows.square)[:-1]

    def _row_limits(self) -> Tensor:
        return self._limit.clamp(min=torch.finfo(self._limit.dtype).tiny)[self._rows.block]

    @torch.no_grad()
    def _evaluated(self, tensors: Sequence[Tensor]) -> tuple[Perspective, RowValues, Tensor]:
        """The function's values for entities, what the rows have, and each row's ``max |w| / M``."""
        rows, count = self._rows.values(tensors), self.entities.count
        owner, device = self._rows.owner, rows.square.device
        if self._limit.device != device:
            self._limit, self._prices = self._limit.to(device), self._prices.to(device)
        if self._running:
            self._limit.scatter_reduce_(0, self._rows.block, rows.largest, "amax")
        reach = rows.largest / self._row_limits()
        most = reach.new_zeros(count + 1).scatter_reduce_(0, owner, reach, "amax")[:-1]
        return (
            perspective(self._squares(rows).sqrt(), most, self.config.alpha, self.config.variant),
            rows,
            reach,
        )


class _Penalty(torch.autograd.Function):
    """The penalty with its gradient written down."""

    @staticmethod
    def forward(ctx: Any, spr: SPR, *tensors: Tensor) -> Tensor:
        values, rows, reach = spr._evaluated(tensors)
        limit = spr._row_limits()
        factor = spr._prices
        share = _shares(spr._rows.owner, reach, spr.entities.count)
        ctx.rows, ctx.sums = rows, spr._rows
        ctx.scale = _of_rows(factor * values.scale, spr._rows.owner)
        ctx.tip = _of_rows(factor * values.tip, spr._rows.owner) * share / limit
        return (factor * values.z).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, *ctx.sums.gradients(ctx.rows, ctx.scale * gradient, ctx.tip * gradient))


def _of_rows(values: Tensor, owner: Tensor) -> Tensor:
    """Entity values at each row; 0 for rows without an entity."""
    return torch.cat([values, values.new_zeros(1)])[owner]


def _shares(owner: Tensor, reach: Tensor, count: int) -> Tensor:
    """How the largest entry of an entity is shared among its rows: equally among those that have it."""
    most = reach.new_zeros(count + 1).scatter_reduce_(0, owner, reach, "amax")
    has = (reach == most[owner]).to(reach)
    number = reach.new_zeros(count + 1).index_add_(0, owner, has)
    return has / number[owner]


def _limits(entities: Entities, tensors: list[nn.Parameter], bounds: Bounds) -> Tensor:
    """``M`` of each block."""
    if isinstance(bounds, nn.Module):
        other = weights_of(bounds, entities)
        tensors = [other[b.weight] for b in entities.blocks]
    elif isinstance(bounds, Mapping):
        missing = [b.layer for b in entities.blocks if b.layer not in bounds]
        if missing:
            raise InvalidOptionError(
                f"bounds lack layer {missing[0]!r}: give one for each layer with entities"
            )
        values = torch.tensor([float(bounds[b.layer]) for b in entities.blocks], dtype=torch.float64)
        if not (torch.isfinite(values) & (values > 0)).all():
            raise InvalidOptionError("bounds of layers: give finite positive numbers")
        return values.to(tensors[0])
    elif bounds not in ("running", "fixed"):
        raise InvalidOptionError(
            f"bounds={bounds!r}: give running, fixed, a network, or a number for each layer"
        )
    views = [b.view(t.detach()) for b, t in zip(entities.blocks, tensors, strict=True)]
    return torch.stack([v.abs().max() for v in views])
