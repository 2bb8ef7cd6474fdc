"""Configurations of Hugging Face models after surgery: updated where they can say the smaller widths.

A configuration has one number where a network has one width for each layer, and some widths, such as the heads of a
model that divides its width by their number, it cannot say at all. So a number is changed only where the class that is
built from the changed configuration has every tensor in the smaller shape and computes what the smaller network does.
Where there is no such configuration it is left as it was, and ``save_pretrained`` says what to do instead.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qcqp_prune.apply.hf_heads import Field, head_size, turns_alike, with_one_set_of_frequencies
from qcqp_prune.apply.verify import TOLERANCE, double_outputs, relative_error
from qcqp_prune.errors import PlanError, VerificationError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.inputs import make_inputs

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]

_ROUNDS = 4

_FEW = 2
"""New sizes of one old size up to which fields that are not set, such as GPT-2's ``n_inner``, are tried as well."""


@dataclass(frozen=True)
class CannotSave:
    """Takes the place of ``save_pretrained`` where no configuration fits; it can be copied and pickled."""

    why: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            PlanError: always, with what to do instead.
        """
        raise PlanError(self.why)


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is of a class of transformers; the package is not imported for it."""
    package = sys.modules.get("transformers")
    return package is not None and isinstance(model, package.PreTrainedModel)


def follow(small: nn.Module, graph: ChannelGraph, flat: BoolArray) -> str:
    """Let the configuration of a model that was cut in place say its widths, where it can.

    Args:
        small: after surgery; its configuration and, where one does not fit, its ``save_pretrained`` are replaced.
        graph: the channel graph.
        flat: ``(unit_count,) bool``.

    Returns:
        What became of the configuration, in words; empty for models that have none, or that lost nothing.
    """
    if not is_pretrained(small) or bool(flat.all()):
        return ""
    with_one_set_of_frequencies(small)
    changes, like = _fitting(small, _new_sizes(graph, flat))
    if isinstance(like, nn.Module) and not turns_alike(small, like):
        like = "positions turn the dimensions that are left by other frequencies"
    if isinstance(like, nn.Module) and _computes_the_same(small, like, graph):
        for field, value in changes.items():
            _set(small.config, field, value)
        _take_numbers(small, like)
        return "the configuration says the new widths: " + _listed(changes)
    what = like if isinstance(like, str) else "another network is built from it"
    kind = type(small.config).__name__
    why = (
        f"a {kind} cannot say the widths that are left ({what}): save with qcqp_prune.save() and load with "
        "qcqp_prune.load(), or trace with uniform=True and leave alone, by units or ignored_layers, what it has no "
        "number for"
    )
    small.save_pretrained = CannotSave(why)  # type: ignore[assignment]
    return f"the configuration is the dense network's: {why}"


def _new_sizes(graph: ChannelGraph, flat: BoolArray) -> dict[int, set[int]]:
    """For each number that a configuration may hold of a width or a count of heads those that it may be now."""
    found: dict[int, set[int]] = {}
    shares: dict[int, set[int]] = {}
    for axis in range(len(graph.axes)):
        for g, share in graph.axis_counts(axis).items():
            shares.setdefault(g, set()).add(share)
        found.setdefault(len(graph.axes[axis]), set()).add(int(flat[graph.axes[axis]].sum()))
    for g, sizes in shares.items():
        width, kept = graph.groups[g].width, int(flat[graph.units(g)].sum())
        for size in sizes:  # heads of queries for each of keys
            found.setdefault(width * size // min(sizes), set()).add(kept * size // min(sizes))
    return {old: new - {old} for old, new in found.items() if new - {old}}


def _fitting(
    small: nn.Module, sizes: Mapping[int, set[int]]
) -> tuple[dict[Field, Any], nn.Module | str | None]:
    """The changes with which a model is built in the smaller shapes, and that model; or what differs at best."""
    want = _shapes(small)
    options = [
        (field, new) for field, old in _numbers(small.config) for new in sorted(sizes.get(old, ())) if old > 0
    ]
    unset = {new for sizes_now in sizes.values() if len(sizes_now) <= _FEW for new in sizes_now if new > 0}
    options += [(field, new) for field in _unset(small.config) for new in sorted(unset)]
    changes = head_size(small, partial(_built, small))
    like = _built(small, changes)
    wrong = _differing(want, like)
    for _ in range(_ROUNDS):
        before = len(wrong)
        for field, new in options:
            if changes.get(field) == new:
                continue
            tried = {**changes, field: new}
            other = _built(small, tried)
            left = _differing(want, other)
            if len(left) < len(wrong):
                changes, like, wrong = tried, other, left
        if not wrong:
            return changes, like
        if len(wrong) == before:
            break
    name, now, said = wrong[0]
    return {}, f"{name} is {now} now, and {said} as a configuration has it"


def _built(small: nn.Module, changes: Mapping[Field, Any]) -> nn.Module | None:
    """The class of a model built on no memory from its configuration with some numbers changed."""
    config: Any = copy.deepcopy(small.config)
    try:
        for field, value in changes.items():
            _set(config, field, value)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = type(config).from_dict(config.to_dict())
            return type(small)(again).eval()
    except Exception as error:  # noqa: BLE001 - of many kinds; such a configuration is none
        logger.debug("%s does not build with %s: %s", type(small).__name__, changes, error)
        return None


def _differing(
    want: Shapes, like: nn.Module | None
) -> list[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    if like is None:
        return [(name, shape, None) for name, shape in want.items()]
    have = _shapes(like)
    names = [*want, *(name for name in have if name not in want)]
    return [(n, want.get(n, ()), have.get(n)) for n in names if want.get(n) != have.get(n)]


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def _computes_the_same(small: nn.Module, like: nn.Module, graph: ChannelGraph) -> bool:
    """Whether the other model, with the smaller one's tensors, gives the same outputs."""
    device = next(iter(small.parameters()), torch.zeros(0)).device
    call = make_inputs(graph, device=device)
    try:
        _lend(small, like)
        own, other = double_outputs(small, call), double_outputs(like, call)
        return relative_error(other, own)[0] <= TOLERANCE[torch.float64]
    except (RuntimeError, ValueError, TypeError, NotImplementedError, VerificationError) as error:
        logger.debug("%s built from its configuration does not run: %s", type(small).__name__, error)
        return False


def _lend(small: nn.Module, like: nn.Module) -> None:
    """Every tensor of the other model that the smaller one has is the smaller one's, at every path."""
    pairs = [*small.named_parameters(remove_duplicate=False), *small.named_buffers(remove_duplicate=False)]
    tensors: dict[str, Any] = dict(pairs)
    for path, module in like.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name in store:
                store[name] = tensors.get(f"{path}.{name}" if path else name, store[name])


def _take_numbers(small: nn.Module, like: nn.Module) -> None:
    """Numbers that modules hold beside their tensors become those of the model that was built anew."""
    others = dict(like.named_modules())
    for path, module in small.named_modules():
        new = vars(others[path]) if path in others else {}
        for name, value in vars(module).items():
            if type(value) is int and type(new.get(name)) is int and not name.startswith("_"):
                setattr(module, name, new[name])


def _numbers(config: Any, path: Field = ()) -> Iterator[tuple[Field, int]]:
    """Every whole number in a configuration, in those inside of it and in lists, and where it stands."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _numbers(value, (*path, name))
        for place, entry in [((), value)] if type(value) is int else _entries(value):
            yield (*path, name, *place), entry


def _unset(config: Any, path: Field = ()) -> Iterator[Field]:
    """Every field without a value, where a class works out a width of its own; numbers of tokens are none."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _unset(value, (*path, name))
        if value is None and not name.endswith("_id"):
            yield (*path, name)


def _entries(value: Any) -> list[tuple[Field, int]]:
    listed = value if isinstance(value, list | tuple) else ()
    return [((k,), entry) for k, entry in enumerate(listed) if type(entry) is int]


def _set(config: Any, field: Field, value: Any) -> None:
    if isinstance(field[-1], int):
        *parents, name, place = field
        owner = _owner(config, parents)
        old = getattr(owner, str(name))
        setattr(owner, str(name), type(old)(value if k == place else x for k, x in enumerate(old)))
    else:
        setattr(_owner(config, field[:-1]), field[-1], value)


def _owner(config: Any, path: Any) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _listed(changes: Mapping[Field, Any]) -> str:
    names = {".".join(str(part) for part in field): value for field, value in changes.items()}
    return ", ".join(name if isinstance(value, dict) else f"{name}={value}" for name, value in names.items())
