"""Parameterised structured pruning: each structure of a weight is scaled by a parameter that training may silence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcqp_prune.errors import InvalidOptionError, UnknownLayerError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray
from qcqp_prune.graph.grouping import matches
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.train.entities import by_unit

PSPStructure = Literal["channel", "column", "shape", "layer"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PSPConfig:
    """How structures are parameterised.

    Attributes:
        structure: ``channel``, one parameter for each input channel ``(C,)``; ``column``, one for each input
            channel and position of the kernel ``(C, R, S)``, shared by all filters; ``shape``, one for each position of
            the kernel ``(R, S)``; ``layer``, one in all, for layers beside which another branch runs.
        threshold: structures whose parameter is smaller than this are zero (``epsilon``). The paper takes 0.2 for
            ResNets and 0.1 for DenseNets.
        spread: standard deviation of the random start; None starts all at 1, for weights that are trained already.
        l1: strength of an l1 penalty on the parameters, in place of the weight decay of the optimiser.
        seed: of the random start.

    Raises:
        InvalidOptionError: a value is outside its domain.
    """

    structure: PSPStructure = "column"
    threshold: float = 0.2
    spread: float | None = 0.1
    l1: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.structure not in get_args(PSPStructure):
            raise InvalidOptionError(
                f"structure={self.structure!r}: choose from {', '.join(get_args(PSPStructure))}"
            )
        for name, value in (("threshold", self.threshold), ("l1", self.l1), ("spread", self.spread or 0.0)):
            if not (math.isfinite(value) and value >= 0):
                raise InvalidOptionError(f"{name}={value!r}: give a number from 0 up")


class ThresholdedScale(nn.Module):
    """The parametrization ``q = w nu(alpha)`` of a weight, ``nu(a) = a`` where ``|a| >= threshold`` and 0 elsewhere.

    The gradient of ``alpha`` is that of ``nu`` (straight through), which by the chain rule is ``sum_j g_ij w_ij`` with
    ``g`` the gradient of ``q``, and that of ``w`` is ``g nu``. (Equation 5 and Table 1 of the paper print the sum of
    the weights' gradients instead.)

    Attributes:
        alpha: of the structure's shape, broadcast against the weight.
        threshold: smallest size that counts.
    """

    def __init__(self, start: Tensor, threshold: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(start)
        self.threshold = threshold

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled weight."""
        scale: Tensor = _Threshold.apply(self.alpha, self.threshold)  # type: ignore[no-untyped-call]
        return weight * scale

    @torch.no_grad()
    def kept(self) -> Tensor:
        """Which structures are not zero, of the shape of ``alpha``."""
        return self.alpha.abs() >= self.threshold


class PSP:
    """The parameterised layers of a network. Every module keeps its class; ``fold`` gives plain weights back.

    Args:
        model: its layers are parameterised in place.
        config: structure, threshold, start.
        layers: names or globs of convolutions. Where None: the graph's convolutions but for those that read the
            network's input, grouped ones, and 1 x 1 convolutions, which transitions and shortcuts are; a graph is
            needed then.
        graph: the channel graph of the model, taken before this call.

    Raises:
        UnknownLayerError: a glob matches no convolution.
        InvalidOptionError: no layer is left, or one is parameterised already.

    References:
        Schindler, Roth, Pernkopf and Froening, "Parameterized structured pruning for deep neural networks" (2019),
        eq. 2 to 7.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PSPConfig | None = None,
        *,
        layers: Iterable[str] | None = None,
        graph: ChannelGraph | None = None,
    ) -> None:
        self.config = PSPConfig() if config is None else config
        modules = {n: m for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
        names = _default(graph, modules) if layers is None else _matching(layers, modules)
        if not names:
            raise InvalidOptionError("no convolution is left to parameterise: name some with layers=")
        for name in names:
            if parametrize.is_parametrized(modules[name], "weight"):
                raise InvalidOptionError(f"the weight of {name} is parameterised already: fold that first")
        self._graph = graph
        self._prices: list[Tensor] | None = None
        generator = torch.Generator().manual_seed(self.config.seed)
        self.scales: dict[str, ThresholdedScale] = {}
        self._modules = {name: modules[name] for name in names}
        for name, module in self._modules.items():
            start = _start(module.weight, self.config, generator)
            self.scales[name] = ThresholdedScale(start, self.config.threshold)
            # The shape stays, and a check of it would run a forward pass of the parametrization.
            parametrize.register_parametrization(module, "weight", self.scales[name], unsafe=True)

    def __call__(self) -> Tensor:
        """The l1 penalty on all structure parameters, a scalar tensor with a gradient; 0 with weight decay alone.

        After ``set_prices`` each structure has its own price in place of the config's strength.
        """
        alphas = self.parameters()
        if self._prices is not None:
            # The network may have moved since.
            self._prices = [p.to(a) for p, a in zip(self._prices, alphas, strict=True)]
            terms = torch._foreach_mul(torch._foreach_abs(list[Tensor](alphas)), self._prices)
            return torch.stack([t.sum() for t in terms]).sum()
        if not self.config.l1:
            return alphas[0].new_zeros(())
        return self.config.l1 * torch.stack(torch._foreach_norm(list[Tensor](alphas), 1)).sum()

    def after_step(self) -> None:
        """Nothing: the threshold acts in the next forward pass."""

    @cached_property
    def unit_of(self) -> IntArray:
        """The unit of each structure, ``(structures,)``; for input channels of a graph's layers.

        Raises:
            InvalidOptionError: the structure is another one, no graph was given, or structures of a layer are no units.
        """
        if self.config.structure != "channel" or self._graph is None:
            raise InvalidOptionError(
                'budgets need structures that are units of a graph: take structure="channel" and give the graph'
            )
        layers = {layer.name: layer for layer in self._graph.layers}
        for name, scale in self.scales.items():
            if name not in layers or len(self._graph.axes[layers[name].in_axis]) != scale.alpha.numel():
                raise InvalidOptionError(
                    f"{name} is grouped, or not in the graph, so its structures are no units: leave it out of layers"
                )
        return np.concatenate([self._graph.axes[layers[name].in_axis] for name in self.scales])

    def indicators(self) -> FloatArray:
        """``|nu|`` of each structure over the largest of its layer, ``(structures,)`` in [0, 1]."""
        found = [v / max(float(v.max()), np.finfo(np.float64).tiny) for v in self.values().values()]
        return np.concatenate([v.ravel() for v in found])

    sizes = indicators

    def kept_units(self) -> BoolArray:
        """Units that some layer reads, ``(units,)``: by a structure that is not zero, or unparameterised."""
        unit_of, graph = self.unit_of, cast(ChannelGraph, self._graph)
        present = np.concatenate([kept.ravel() for kept in self.kept().values()])
        read: BoolArray = by_unit(graph, unit_of, present) > 0
        for layer in graph.layers:
            if layer.name not in self.scales:
                read[graph.axes[layer.in_axis]] = True
        return read

    def set_prices(self, prices: FloatArray) -> None:
        """Take ``sum_i price_i |alpha_i|`` for the penalty; ``(structures,)``, at least 0."""
        alphas = self.parameters()
        parts = np.split(np.asarray(prices, np.float64), np.cumsum([a.numel() for a in alphas])[:-1])
        self._prices = [
            torch.from_numpy(p).reshape(a.shape).to(a) for p, a in zip(parts, alphas, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Its config, and the layers that it scales."""
        return {"kind": "psp", **asdict(self.config), "layers": list(self.scales)}

    def state_dict(self) -> dict[str, Tensor]:
        """The prices where there are any; the parameters are the network's."""
        return {} if self._prices is None else {"prices": torch.cat([p.flatten() for p in self._prices])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        if "prices" in state:
            self.set_prices(state["prices"].cpu().double().numpy())

    def parameters(self) -> list[nn.Parameter]:
        """All structure parameters, for a group of their own in an optimiser."""
        return [scale.alpha for scale in self.scales.values()]

    def kept(self) -> dict[str, FloatArray]:
        """For each layer which structures are not zero, of the structure's shape."""
        return {n: _plain(s.kept(), self.config.structure) for n, s in self.scales.items()}

    def values(self) -> dict[str, FloatArray]:
        """For each layer ``|nu|`` of its structures, of the structure's shape."""
        return {
            n: _plain((s.alpha.detach().abs() * s.kept()), self.config.structure)
            for n, s in self.scales.items()
        }

    def fold(self) -> None:
        """Multiply the scales into the weights, and take the parametrization off: ``W <- W nu``."""
        for module in self._modules.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            # The bias stands behind the weight again, as in a plain module.
            module.register_parameter("bias", module._parameters.pop("bias"))
        self._modules = {}


class _Threshold(torch.autograd.Function):
    """``nu(alpha)`` with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, threshold: float) -> Tensor:
        return torch.where(alpha.abs() >= threshold, alpha, torch.zeros_like(alpha))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _start(weight: Tensor, config: PSPConfig, generator: torch.Generator) -> Tensor:
    kernel = weight.dim() - 2
    shape = {
        "channel": (1, weight.shape[1], *[1] * kernel),
        "column": (1, *weight.shape[1:]),
        "shape": (1, 1, *weight.shape[2:]),
        "layer": (1,) * weight.dim(),
    }[config.structure]
    if config.spread is None:
        return torch.ones(shape, dtype=weight.dtype, device=weight.device)
    # Drawn on the CPU, so that a seed means the same on every device.
    return (config.spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(weight)


def _plain(values: Tensor, structure: PSPStructure) -> FloatArray:
    values = values.detach().cpu()
    array: FloatArray = (values.double() if values.is_floating_point() else values).numpy()
    kernel = array.shape[2:]
    shapes = {"channel": (-1,), "layer": (), "shape": kernel, "column": array.shape[1:]}
    return array.reshape(shapes[structure])


def _matching(layers: Iterable[str], modules: dict[str, Any]) -> list[str]:
    globs = [layers] if isinstance(layers, str) else list(layers)
    for glob in globs:
        if not any(matches(name, glob) for name in modules):
            raise UnknownLayerError(
                f"{glob!r} matches no convolution of the model: look at model.named_modules()"
            )
    return [name for name in modules if any(matches(name, glob) for glob in globs)]


def _default(graph: ChannelGraph | None, modules: dict[str, Any]) -> list[str]:
    """All convolutions but those at the input and those that are 1 x 1."""
    if graph is None:
        raise InvalidOptionError(
            "give the layers to parameterise, or the model's channel graph to choose them by"
        )
    chosen = []
    for layer in graph.layers:
        module = modules.get(layer.name)
        reads_input = bool(graph.stays[graph.axes[layer.in_axis]].all())
        if module is not None and not reads_input and max(module.kernel_size) > 1 and module.groups == 1:
            chosen.append(layer.name)
    return chosen
