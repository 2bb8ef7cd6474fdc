"""What a model returns, whatever container it is in, and models that would hand out a cache beside it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.state import eval_mode

_PLAIN = (Tensor, int, float, str, bool, complex, type(None))


def opened(output: Any) -> Any:
    """An output with everything that PyTorch cannot look into replaced by the list of its tensors.

    Tuples, lists, dicts and registered classes stay what they are; of a dataclass, a mapping of another kind or any
    other object only the tensors are left, in the order of its attributes.
    """
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else _tensors(leaf, set()), output)


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, str | type | nn.Module) or id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
        parts += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    return [tensor for part in parts for tensor in _tensors(part, seen)]


def output_leaves(output: Any) -> list[Any]:
    """The tensors and plain values that a model returned."""
    return pytree.tree_leaves(opened(output))


def floats(output: Any) -> list[Tensor]:
    """The tensors of floating numbers that a model returned."""
    return [x for x in output_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def logits_of(output: Any) -> Tensor:
    """What a classifier says of the classes: a tensor as it is, what is called ``logits``, or the one tensor there is.

    Raises:
        InvalidOptionError: there is no tensor of floating numbers, or there are several and none is called ``logits``.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = floats(output)
    if len(found) != 1:
        raise InvalidOptionError(
            f"the network returns {said(output)} with {len(found)} tensors of floating numbers and none called logits: "
            "let it return its logits, alone or under that name, or give a loss that takes what it returns"
        )
    return found[0]


def said(output: Any) -> str:
    """What a model returned, in words: the shape of a tensor, the kind of anything else."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"


@contextlib.contextmanager
def open_outputs(model: nn.Module) -> Iterator[None]:
    """The model returning ``opened`` outputs; its paths, signature and class are what they were."""
    own = model.__dict__.get("forward")
    forward = model.forward

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Any:
        return opened(forward(*args, **kwargs))

    model.forward = returning
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextlib.contextmanager
def traced_state(model: nn.Module) -> Iterator[None]:
    """The state in which a model is traced and compared: eval mode, nothing kept from earlier calls, no cache given."""
    with eval_mode(model), without_cache(model):
        yield


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """The model with ``use_cache`` off in the configuration of each of its modules, as it was afterwards.

    Keys and values that a language model hands out for its next call are a state, not a result: as outputs they would
    have to keep their size, and with them every head. A caller who asks for them by an argument still gets them.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    changed = [config for config in configs if getattr(config, "use_cache", None) is True]
    for config in changed:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True  # type: ignore[union-attr]
