"""Helpers of the tests: live random weights, valid random masks, and checks that share no code with the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked import masked
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.apply.surgery import copied
from qcqp_prune.apply.verification import Verification
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, TensorSpec
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.problem import allowed_counts, tie_classes
from qcqp_prune.resources import Macs, Memory, Params

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MIXERS = (nn.LayerNorm, nn.GroupNorm, nn.Softmax, nn.CosineSimilarity)


def liven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and statistics with which no signal dies and no two channels are alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.copy_(normal(p) * (1.7 / max(p[0].numel(), 1) ** 0.5))
            elif name.endswith("bias"):
                p.copy_(0.4 * normal(p))
            else:
                p.copy_((0.6 + normal(p).abs()) * normal(p).sign())
        for module in model.modules():
            if isinstance(module, NORMS) and module.running_mean is not None:
                module.running_mean.copy_(0.3 * normal(module.running_mean))
                module.running_var.copy_(0.5 + normal(module.running_var).abs())
    return model


def random_masks(graph: ChannelGraph, seed: int, share: float | None = None) -> Masks:
    """Allowed counts drawn group by group (tied groups alike), then which units; about ``share`` where given."""
    rng = np.random.default_rng(seed)
    allowed = allowed_counts(graph)
    for _ in range(50 if len(graph.links) else 1):
        flat = _drawn(graph, allowed, rng, share)
        counts = np.bincount(graph.group_of_unit[flat], minlength=len(graph.groups)).tolist()
        has_columns = any(layer.columns is not None for layer in graph.layers)
        if has_columns or all(n in a for n, a in zip(counts, allowed, strict=True)):
            return Masks.from_flat(graph, flat)
    return all_kept(graph)


def _drawn(
    graph: ChannelGraph, allowed: list[list[int]], rng: np.random.Generator, share: float | None
) -> BoolArray:
    flat = np.ones(graph.unit_count, np.bool_)
    drawn: dict[str, int] = {}
    allowed = _with_blocks_drawn(graph, allowed, rng)
    for g, group in enumerate(graph.groups):
        count = int(rng.choice(allowed[g]))
        if share is not None:
            count = min(allowed[g], key=lambda n: abs(n - share * group.width))
        if group.tie is not None:
            count = drawn.setdefault(group.tie, count)
        flat[graph.units(g)] = rng.permutation(group.width) < count
    if not len(graph.links):
        return flat
    stays = graph.stays
    if any(layer.columns is not None for layer in graph.layers):
        _suit_parts(graph, flat, stays, rng)
    return graph.links.closed(flat) | (flat & stays)


def _with_blocks_drawn(
    graph: ChannelGraph, allowed: list[list[int]], rng: np.random.Generator
) -> list[list[int]]:
    """Counts that are left where each block is kept or removed by a coin, within what is around it."""
    left = [list(counts) for counts in allowed]
    for block in graph.blocks:
        left[graph.group_of_unit[block.unit]] = [int(rng.random() < 0.5)]
    for block in reversed(graph.blocks):
        around = block.outer
        while around is not None:
            if left[graph.group_of_unit[graph.blocks[around].unit]] == [0]:
                left[graph.group_of_unit[block.unit]] = [0]
            around = graph.blocks[around].outer
    return graph.needs.settled(left, tie_classes([g.tie or f"group {k}" for k, g in enumerate(graph.groups)]))


def _suit_parts(graph: ChannelGraph, flat: BoolArray, stays: BoolArray, rng: np.random.Generator) -> None:
    """Parts of removed wholes go, and a kept whole gets a part, so that the counts of wholes stay as drawn."""
    links = graph.links
    for level in reversed(links.levels or ()):
        gone = links.parts[level][~flat[links.wholes[level]]]
        flat[gone[~stays[gone]]] = False
        for whole in np.unique(links.wholes[level]).tolist():
            parts = links.parts[links.wholes == whole]
            if flat[whole] and not stays[whole] and not flat[parts].any():
                flat[rng.choice(parts)] = True
    for layer in graph.layers:  # and every layer keeps a column
        columns = graph.axes[layer.made_axis]
        if layer.columns is not None and not flat[columns].any():
            filters = np.repeat(graph.axes[layer.out_axis], len(columns) // len(graph.axes[layer.out_axis]))
            flat[rng.choice(columns[flat[filters]] if flat[filters].any() else columns)] = True


def all_kept(graph: ChannelGraph) -> Masks:
    return Masks.from_flat(graph, np.ones(graph.unit_count, np.bool_))


def keep(graph: ChannelGraph, **kept: list[int]) -> Masks:
    """Masks that keep the listed units of the named groups (``_`` for a dot) and all of the others."""
    flat = np.ones(graph.unit_count, np.bool_)
    for g, group in enumerate(graph.groups):
        listed = kept.pop(group.id.replace(".", "_"), None)
        if listed is not None:
            flat[graph.units(g)] = np.isin(np.arange(group.width), listed)
    assert not kept, f"no such group: {list(kept)}; there are {[g.id for g in graph.groups]}"
    return Masks.from_flat(graph, flat)


def reasons(graph: ChannelGraph) -> dict[str, str | None]:
    """Why each group is kept, None where it is not."""
    return {g.id: g.frozen_reason for g in graph.groups}


def widths(graph: ChannelGraph, *, free: bool = False) -> dict[str, int]:
    """Units of each group; of those that may be pruned where ``free``."""
    return {g.id: g.width for g in graph.groups if not free or g.frozen_reason is None}


def uses(graph: ChannelGraph, masks: Masks | None = None) -> dict[str, int]:
    """What each resource says of the masks, or of the whole network."""
    flat = (masks or all_kept(graph)).flat(graph)
    counts = np.bincount(graph.group_of_unit[flat], minlength=len(graph.groups))
    return {r.name: r.form(graph).evaluate(counts) for r in (Macs(), Params(), Memory())}


def entries_kept(graph: ChannelGraph, spec: TensorSpec, flat: BoolArray) -> BoolArray:
    """Which entries of a tensor stay, in its shape."""
    out = np.ones(spec.shape, np.bool_)
    if spec.columns is not None:
        units = graph.axes[spec.columns].reshape(spec.shape[0], -1)
        for j, a, b in np.ndindex(spec.shape[0], *spec.shape[2:]):
            own = units[j]
            out[j, :, a, b] = flat[own[0] if len(own) == 1 else own[a * spec.shape[3] + b]]
    for dim, axis in enumerate(spec.axes):
        if axis is None:
            continue
        along = flat[graph.axes[axis]]
        if dim == 1 and spec.segments > 1:
            for row in range(spec.shape[0]):
                segment = row // (spec.shape[0] // spec.segments)
                local = along[segment * spec.shape[1] : (segment + 1) * spec.shape[1]]
                out[row][~local] = False
        else:
            out[(slice(None),) * dim + (~along,)] = False
    return out


def zeroed(model: nn.Module, graph: ChannelGraph, masks: Masks) -> nn.Module:
    """A full-size copy in which every removed entry of every tensor is zero: what removal means, by plain PyTorch.

    It computes what the smaller network computes unless an operator mixes channels without weights (`MIXERS`, a mean
    over channels, ...).
    """
    flat = masks.flat(graph)
    full = copied(model)
    state = dict(full.named_parameters()) | dict(full.named_buffers())
    with torch.no_grad():
        for spec in graph.tensors:
            state[spec.name].masked_fill_(~torch.from_numpy(entries_kept(graph, spec, flat)), 0)
    return full


def doubled(inputs: Any) -> Any:
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


def run(model: Any, inputs: Any) -> list[Tensor]:
    """Output tensors in double precision and eval mode, on a copy."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, nn.Module):
        model = copied(model).double().eval()
    with torch.no_grad():
        out = pytree.tree_leaves(model(*doubled(args)))
    return [x.double() for x in out if isinstance(x, Tensor)]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference between two outputs, relative to what of the second varies within its tensor."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        scale = (y - y.mean()).abs().max().clamp(min=1e-12)
        worst = max(worst, float(((x - y).abs().max() / scale).double()))
    return worst


def anew(inputs: Any, seed: int) -> tuple[Tensor, ...]:
    """Other inputs like the given ones: normal, or integers in the same range."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x.shape, generator=generator)
        if x.is_floating_point()
        else torch.randint(0, int(x.max()) + 1, x.shape, generator=generator).to(x.dtype)
        for x in (inputs if isinstance(inputs, tuple) else (inputs,))
    )


def depends_on_input(model: nn.Module, inputs: Any) -> bool:
    return difference(run(model, anew(inputs, 8)), run(model, inputs)) > 1e-3


def hooked_macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-adds of one sample by the textbook, from what each convolution and linear module sees and gives."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        per_output = (
            module.weight[0].numel() if not hasattr(module, "transposed") or not module.transposed else 0
        )
        if per_output:
            total += out.numel() * per_output
        else:
            total += args[0].numel() * module.weight[0].numel()

    def count_columns(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        total += out.numel() // module.out_channels * module.weight.numel()

    hooks = [
        m.register_forward_hook(count_columns if isinstance(m, ShapeConv2d) else count)
        for m in model.modules()
        if isinstance(m, nn.modules.conv._ConvNd | nn.Linear | ShapeConv2d)
    ]
    run_args = inputs if isinstance(inputs, tuple) else (inputs,)
    training = model.training
    with torch.no_grad():
        model.eval()(*run_args)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return total // run_args[0].shape[0]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that pruning a copy of it must not touch."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in state.items()},
        "objects": {name: id(t) for name, t in state.items()},
        "modules": {name: id(m) for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "requires_grad": {name: t.requires_grad for name, t in state.items()},
        "grads": {name: t.grad for name, t in state.items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for key in ("objects", "modules", "training", "requires_grad", "grads"):
        assert after[key] == before[key], key
    assert after["values"].keys() == before["values"].keys()
    assert all(torch.equal(before["values"][name], t) for name, t in after["values"].items())


def assert_slices(model: nn.Module, small: nn.Module, graph: ChannelGraph, masks: Masks) -> None:
    """Every tensor of the smaller network is the kept part of the original's, under the same name."""
    flat = masks.flat(graph)
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    new = dict(small.named_parameters()) | dict(small.named_buffers())
    for spec in graph.tensors:
        if spec.name not in new:  # a rewritten graph module has no entry for what it does not use
            continue
        kept = torch.from_numpy(entries_kept(graph, spec, flat))
        part = old[spec.name][kept]
        if spec.columns is not None and new[spec.name].ndim == 2:  # stored by kernel position, filter, input
            part = old[spec.name].permute(2, 3, 0, 1)[kept.permute(2, 3, 0, 1)]
        assert torch.equal(new[spec.name].flatten(), part.flatten()), spec.name
        assert new[spec.name].requires_grad == old[spec.name].requires_grad


def prune_and_check(
    model: nn.Module,
    inputs: Any,
    graph: ChannelGraph,
    masks: Masks,
    *,
    realisation: str = "auto",
    mixes: bool = False,
    live: bool = True,
) -> tuple[nn.Module, Verification]:
    """Shrink, and check by other means all that the library promises.

    Args:
        mixes: the network mixes channels without weights, so that zeroing is not removal.
        live: outputs must depend on the input and on what was removed; False for masks that may cut everything.
    """
    before = snapshot(model)
    small, verification = shrink_and_verify(model, graph, masks, realisation=realisation)  # type: ignore[arg-type]
    assert_untouched(model, before)
    assert_slices(model, small, graph, masks)
    assert small.training == model.training

    assert {c.resource for c in verification.counts} >= {"macs", "params", "memory"}
    counted = {c.resource: c.predicted for c in verification.counts}
    if verification.realisation == "modules":
        assert counted["params"] == sum(p.numel() for p in small.parameters())

    fresh = anew(inputs, 7)
    got = run(small, fresh)
    # Weights follow floating inputs; where all are integers, weights in double precision are given.
    floating = any(x.is_floating_point() for x in fresh)
    dense = model if floating else copied(model).double()
    want = pytree.tree_leaves(masked(dense, graph, masks)(*doubled(fresh)))
    assert difference(got, want) < 1e-7
    if not mixes:
        assert difference(got, run(zeroed(model, graph, masks), fresh)) < 1e-7
    if live:
        assert depends_on_input(model, inputs), "the dense network is dead"
    return small, verification
