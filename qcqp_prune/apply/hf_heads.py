"""The size of heads in configurations of Hugging Face models, with the rotations and the scale that follow from it.

A class works out from ``head_dim`` by which frequencies positions turn its pairs of dimensions, and the scale of its
attention. Both stay the dense network's where dimensions of heads go. A configuration can say so by the factors of
LongRoPE, one for each pair: what a rotation multiplies queries and keys with is there a number of its own, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Field = tuple[str | int, ...]
"""Where a number stands in a configuration: names of attributes, and places in lists."""

Build = Callable[[dict[Field, Any]], nn.Module | None]
"""The class of a model built on no memory from its configuration with some entries changed."""

_ROUNDING = 1e-6
"""Relative: frequencies are worked out anew in single precision."""


def head_size(small: nn.Module, build: Build) -> dict[Field, Any]:
    """What to change in a configuration where all layers have heads of one size that it does not say.

    Such as a configuration that divides a width by the number of heads, or one of before dimensions were cut.
    """
    found = {size for m in small.modules() if type(size := getattr(m, "head_dim", None)) is int}
    if len(found) != 1 or getattr(small.config, "head_dim", None) in found:
        return {}
    changes: dict[Field, Any] = {("head_dim",): found.pop()}
    like = build(changes)
    rotations = None if like is None else _rotations(small, like)
    return changes if rotations is None else {**changes, ("rope_parameters",): rotations}


def _rotations(small: nn.Module, like: nn.Module) -> dict[str, Any] | None:
    """LongRoPE's parameters for the frequencies and the scale that a model has, where its class has others."""
    given: Any = getattr(small.config, "rope_parameters", None)
    frequencies, scales, longest = (
        _frequencies(small),
        _scales(small, like),
        getattr(small.config, "max_position_embeddings", None),
    )
    if not isinstance(given, dict) or given.get("rope_type") != "default" or type(longest) is not int:
        return None
    if len(frequencies) != 1 or len(scales) != 1 or (turns_alike(small, like) and scales == {1.0}):
        return None
    (kept,) = (f.double().cpu() for f in frequencies.values())
    pairs = torch.arange(len(kept), dtype=torch.float64) / len(kept)
    factors = (1 / (kept * given["rope_theta"] ** pairs)).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": given["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": longest,
        "attention_factor": math.sqrt(scales.pop()),  # of queries, and of keys
    }


def turns_alike(small: nn.Module, like: nn.Module) -> bool:
    """Whether the rotations that a class works out when it is loaded are those of the smaller network."""
    others = dict(like.named_modules())
    for path, frequencies in _frequencies(small).items():
        config = getattr(others.get(path), "config", None)
        if config is None:  # not worked out from a configuration
            continue
        anew: Tensor = type(small.get_submodule(path))(config).inv_freq  # type: ignore[assignment]
        if anew.shape != frequencies.shape or not _close(anew, frequencies):
            return False
    return True


def with_one_set_of_frequencies(small: nn.Module) -> None:
    """The frequencies that a rotation was built with are those that it has, in place.

    It keeps them beside those that its forward reads, to go back to after long texts; so no surgery cuts them.
    """
    for path, frequencies in _frequencies(small).items():
        module = small.get_submodule(path)
        built = getattr(module, "original_inv_freq", None)
        if isinstance(built, Tensor) and built.shape != frequencies.shape:
            module.original_inv_freq = frequencies.clone()


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.to(a), rtol=_ROUNDING, atol=0)


def _frequencies(model: nn.Module) -> dict[str, Tensor]:
    """Frequencies that are not saved, by path of their modules."""
    return {
        path: module.inv_freq
        for path, module in model.named_modules()
        if "inv_freq" in module._non_persistent_buffers_set and isinstance(module.inv_freq, Tensor)
    }


def _scales(small: nn.Module, like: nn.Module) -> set[float]:
    """How many times the scale of attention is what the class works out."""
    others = dict(like.named_modules())
    return {
        module.scaling / others[path].scaling
        for path, module in small.named_modules()
        if type(getattr(module, "scaling", None)) is float
        and type(getattr(others.get(path), "scaling", None)) is float
    }
