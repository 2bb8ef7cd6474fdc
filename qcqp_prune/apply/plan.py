"""Saving a smaller network without pickle, and loading it again through the user's own constructor.

A saved network is a folder of two files. ``plan.json`` says what was cut: the channel graph, the masks, the name, shape
and dtype of every tensor, and checksums. ``weights.safetensors`` holds the tensors. Neither can run code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qcqp_prune.apply.hf_config import follow
from qcqp_prune.apply.plan_data import FORMAT, PLAN, WEIGHTS, Plan, StoredTensor, read_plan
from qcqp_prune.apply.probe import take_probes
from qcqp_prune.apply.rewrite import REALISATION_KEY, rewritings
from qcqp_prune.apply.surgery import check_masks, copied, cut, kept_part
from qcqp_prune.errors import PlanError, QcqpPruneError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.export import canonical_names
from qcqp_prune.graph.masks import Masks
from qcqp_prune.storage import (
    StrPath,
    library_version,
    new_folder,
    read_json,
    require_free,
    sha256,
    write_bytes,
    write_json,
)

logger = logging.getLogger(__name__)

_SHOWN = 5  # differences named in an error

Constructor = Callable[[], nn.Module]


def save(small: nn.Module, folder: StrPath, *, graph: ChannelGraph, masks: Masks) -> Path:
    """Save a smaller network so that ``load`` can rebuild it from the constructor of the dense one.

    The folder is written aside and renamed. One that holds a saved network is replaced; anything else is left alone.

    Args:
        small: from ``shrink`` or ``prune``; it may have been finetuned, moved or cast since.
        folder: the folder to make.
        graph: of the dense network.
        masks: that ``small`` was cut with.

    Returns:
        The folder.

    Raises:
        MaskMismatchError: graph and masks do not belong together.
        PlanError: ``small`` is not what the masks describe, or something else stands in the folder's place.
    """
    flat = masks.flat(graph)
    check_masks(graph, flat)
    tensors = _tensors(small)
    realisation = _realisation(small)
    _require_cut(graph, flat, tensors, realisation)
    stored = tuple(_described(small))
    try:
        content = safetensors.torch.save(
            {t.name: tensors[t.name].detach().cpu().clone().contiguous() for t in stored}
        )
        probes = take_probes(small, graph)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(
            f"the network cannot be saved ({error}): check that it runs on the traced inputs"
        ) from error
    plan = Plan(
        graph=graph,
        masks=masks,
        realisation=realisation,
        training=small.training,
        tensors=stored,
        probes=probes,
        weights_sha256=sha256(content),
        library=library_version(),
        torch=torch.__version__,
    )
    with new_folder(folder, _is_plan) as aside:
        write_bytes(aside / WEIGHTS, content)
        write_json(aside / PLAN, plan.to_json())
    return Path(folder)


def require_place(folder: StrPath) -> None:
    """Ask, before any work is done, whether ``save`` could write this folder; nothing is written.

    Raises:
        PlanError: something else stands there, or nothing can be written there.
    """
    require_free(folder, _is_plan)


def load(folder: StrPath, model: nn.Module | Constructor) -> nn.Module:
    """Rebuild a saved network: make the dense one, cut it as the plan says, and fill in the weights.

    Args:
        folder: from ``save``.
        model: the dense network, which is not changed, or something that makes it: a class, a function, a lambda. Its
            weights do not matter.

    Returns:
        The smaller network, in the train or eval mode it was saved in, on the device of ``model``. It computes what the
        saved one computed, bit for bit on one machine.

    Raises:
        PlanError: a file is missing or corrupt, was changed, or does not fit the model.
    """
    plan = read_plan(folder)
    weights = _read_weights(Path(folder) / WEIGHTS, plan)
    dense = copied(model) if isinstance(model, nn.Module) else model()
    if not isinstance(dense, nn.Module):
        raise PlanError(
            f"the constructor made a {type(dense).__name__}: give one that returns a torch.nn.Module"
        )
    _require_dense(dense, plan)
    refused = PlanError("the plan gives no network: save it again")
    for small in _rebuilt(dense, plan):
        try:
            _fill(small, plan, weights)
            small.train(plan.training)
            _require_probes(small, plan)
            return small
        except PlanError as error:  # of a rewritten graph the next has fewer free sizes
            refused = error
    raise refused


def _rebuilt(dense: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """What the saved network may have been, the likeliest first."""
    try:
        flat = plan.masks.flat(plan.graph)
        check_masks(plan.graph, flat)
        small = copied(dense)
        cut(small, plan.graph, flat)
        if plan.realisation == "graph":
            yield from rewritings(dense, small, plan.graph, flat)
        else:
            follow(small, plan.graph, flat)
            yield small
    except QcqpPruneError as error:
        raise PlanError(f"the model cannot be cut as the plan says: {error}") from error


def _realisation(small: nn.Module) -> str:
    return "graph" if REALISATION_KEY in (getattr(small, "meta", None) or {}) else "modules"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by path, those that a state dict leaves out and every path of a tied one too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _described(model: nn.Module) -> list[StoredTensor]:
    names = canonical_names(model)
    tensors = _tensors(model)
    return [
        StoredTensor(
            name=name,
            aliases=tuple(alias for alias, first in names.items() if first == name and alias != name),
            shape=tuple(tensors[name].shape),
            dtype=str(tensors[name].dtype).removeprefix("torch."),
        )
        for name, canonical in names.items()
        if canonical == name
    ]


def _require_cut(
    graph: ChannelGraph, flat: BoolArray, tensors: Mapping[str, Tensor], realisation: str
) -> None:
    """Refuse to save a network under masks that it was not cut with."""
    gone = graph.removed_tensors(flat)
    for spec in graph.tensors:
        tensor = tensors.get(spec.name)
        if spec.name in gone and tensor is not None:
            raise PlanError(
                f"{spec.name} belongs to a residual branch that the masks remove: save the network together with the "
                "masks that it was cut with"
            )
        if tensor is None:
            if realisation == "modules" and spec.name not in gone:
                raise PlanError(
                    f"the network has no tensor {spec.name}: save the network that shrink() returned"
                )
            continue  # a rewritten graph drops what its forward does not use
        wanted = tuple(kept_part(graph, spec, torch.empty(spec.shape, device="meta"), flat).shape)
        if tuple(tensor.shape) != wanted:
            raise PlanError(
                f"{spec.name} has shape {tuple(tensor.shape)}, the masks say {wanted}: save the network "
                "together with the masks that it was cut with"
            )


def _is_plan(folder: Path) -> bool:
    """Whether a folder holds a saved network and nothing else."""
    if {entry.name for entry in folder.iterdir()} - {PLAN, WEIGHTS}:
        return False
    try:
        return read_json(folder / PLAN, "a plan").get("format") == FORMAT
    except PlanError:
        return False


def _read_weights(path: Path, plan: Plan) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"{path} cannot be read ({error.strerror}): copy the whole folder that save() wrote"
        ) from error
    if sha256(content) != plan.weights_sha256:
        raise PlanError(
            f"{path} is damaged or belongs to another plan, its checksum does not match: copy the folder again"
        )
    try:
        weights = safetensors.torch.load(content)
    except SafetensorError as error:
        raise PlanError(f"{path} is no safetensors file ({error}): copy the folder again") from error
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != {t.name: t.shape for t in plan.tensors}:
        raise PlanError(f"{path} does not hold the tensors that the plan lists: copy the folder again")
    return weights


def _require_dense(dense: nn.Module, plan: Plan) -> None:
    """Refuse a model with other tensors than the one that was traced."""
    names, tensors = canonical_names(dense), _tensors(dense)
    wanted = {name: spec for spec in plan.graph.tensors for name in (spec.name, *spec.aliases)}
    missing = [f"lacks {name}" for name in wanted if name not in tensors]
    extra = [f"has {name}, which the plan does not know" for name in tensors if name not in wanted]
    shapes = [
        f"has {name} in shape {tuple(tensors[name].shape)}, not {spec.shape}"
        for name, spec in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != spec.shape
    ]
    ties = [
        f"has {name} {'tied to ' + names[name] if names[name] != name else 'not tied to ' + spec.name}"
        for name, spec in wanted.items()
        if name in names and names[name] != spec.name
    ]
    # One of each kind first: a wrapped model shows in the names that are missing beside those that are too many.
    problems = [p for row in zip_longest(shapes, missing, extra, ties) for p in row if p is not None]
    _refuse(
        problems, f"the model ({type(dense).__name__}) is not the one that was pruned ({plan.graph.model})"
    )


def _fill(small: nn.Module, plan: Plan, weights: Mapping[str, Tensor]) -> None:
    tensors = _tensors(small)
    if _shapes(_described(small)) != _shapes(plan.tensors):
        problems = [f"lacks {t.name}" for t in plan.tensors if t.name not in tensors]
        problems += [
            f"has {t.name} in shape {tuple(tensors[t.name].shape)}, not {t.shape}"
            for t in plan.tensors
            if t.name in tensors and tuple(tensors[t.name].shape) != t.shape
        ]
        problems = problems or [f"torch {torch.__version__} builds another graph than torch {plan.torch} did"]
        _refuse(problems, "the network rebuilt from the plan has other tensors than the saved one")
    with torch.no_grad():
        for name, value in weights.items():
            tensor = tensors[name]
            if tensor.dtype == value.dtype:
                tensor.copy_(value)
            else:  # cast after it was cut
                tensor.data = value.to(tensor.device)


def _shapes(
    tensors: list[StoredTensor] | tuple[StoredTensor, ...],
) -> dict[str, tuple[set[str], tuple[int, ...]]]:
    return {t.name: (set(t.aliases), t.shape) for t in tensors}


def _require_probes(small: nn.Module, plan: Plan) -> None:
    try:
        probes = take_probes(small, plan.graph)
    except Exception as error:  # whatever a user's forward raises
        raise PlanError(
            f"the rebuilt network does not run on the traced inputs ({error}): give the constructor of the network "
            "that was pruned"
        ) from error
    if len(probes) != len(plan.probes) or not all(
        a.agrees(b) for a, b in zip(plan.probes, probes, strict=True)
    ):
        raise PlanError(
            "the rebuilt network has the right tensors but computes something else than the saved one: its forward "
            "differs. Give the constructor of the network that was pruned, with the same arguments"
        )


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PlanError(
            f"{what}: it {'; it '.join(problems[:_SHOWN])}{more}. Give the constructor of the same architecture"
        )
