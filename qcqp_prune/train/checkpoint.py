"""Checkpoints: one safetensors file, tensors in its body and JSON in its header, so that no pickle is ever loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from qcqp_prune.errors import TrainingError
from qcqp_prune.storage import digest_of, sha256
from qcqp_prune.train.average import WeightAverage
from qcqp_prune.train.config import FinetuneConfig
from qcqp_prune.train.history import EpochRecord
from qcqp_prune.train.regularizer import Regularizer

_VERSION = 2
_HEADER, _DIGEST = "qcqp_prune.checkpoint", "qcqp_prune.sha256"
# Where a run goes on and whether it is watched do not change what it computes.
_FREE = ("device", "progress")
_SHORT = {"trained": "other parameters are trained", "teacher": "the teacher is another one"}

Parts = Sequence[Regularizer | WeightAverage]
"""What a run holds beside model and optimiser."""


@dataclass(frozen=True)
class RunIdentity:
    """What two runs must share for one to go on from the other's checkpoint.

    Attributes:
        config: of both runs.
        epochs: of the whole run; the schedule of the learning rate depends on it.
        trained: names of the parameters that are trained, in the optimiser's order.
        regularizer: what is added to the loss; empty for nothing.
        teacher: a digest of the teacher's tensors; empty without one.
        first_epoch: the number that the first epoch draws by.
        loss: the name of the loss that was given; empty for the cross-entropy.
    """

    config: FinetuneConfig
    epochs: int
    trained: tuple[str, ...]
    regularizer: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""
    first_epoch: int = 0
    loss: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON gives back unchanged."""
        config = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        plain = {
            "epochs": self.epochs,
            "trained": self.trained,
            "regularizer": dict(self.regularizer),
            "teacher": self.teacher,
            "first_epoch": self.first_epoch,
            "loss": self.loss,
            **config,
        }
        return dict(json.loads(json.dumps(plain)))


def state_digest(model: nn.Module) -> str:
    """A digest of the tensors of a network's state."""
    state = {n: v for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    flat = {n: v.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for n, v in state.items()}
    return digest_of({n: sha256(v.numpy().tobytes()) for n, v in flat.items()})


def write_checkpoint(
    path: Path,
    identity: RunIdentity,
    model: nn.Module,
    optimizer: Optimizer,
    records: list[EpochRecord],
    parts: Parts = (),
) -> None:
    """Write a checkpoint after an epoch: aside first, then renamed, so that a kill leaves the old one whole."""
    tensors: dict[str, Tensor] = {}
    for name, value in _tensor_state(model).items():
        tensors[f"model/{name}"] = _detached(value)
    for part in parts:
        for name, value in part.state_dict().items():
            tensors[f"{_prefix(part)}{name}"] = _detached(value)
    scalars: dict[str, Any] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = _detached(value)
            else:
                scalars[f"{index}/{name}"] = value
    header = {
        "version": _VERSION,
        "identity": identity.to_dict(),
        "records": [asdict(record) for record in records],
        "optimizer_scalars": scalars,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        text = json.dumps(header)
        file.write(save(tensors, metadata={_HEADER: text, _DIGEST: _digest(text, tensors)}))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_checkpoint(
    path: Path,
    identity: RunIdentity,
    model: nn.Module,
    optimizer: Optimizer,
    parts: Parts = (),
) -> list[EpochRecord]:
    """Fill model, optimiser and what else there is from a checkpoint, and return the epochs that were done.

    Raises:
        TrainingError: the file is corrupt, or belongs to another run; nothing was changed then.
    """
    header, tensors = _load(path)
    _check_identity(path, header["identity"], identity.to_dict())
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    _check_shapes(path, weights, _tensor_state(model))
    state: dict[int, dict[str, Any]] = {}
    for name, value in {
        **tensors,
        **{f"optimizer/{n}": v for n, v in header["optimizer_scalars"].items()},
    }.items():
        if name.startswith("optimizer/"):
            _, index, entry = name.split("/", 2)
            state.setdefault(int(index), {})[entry] = value
    model.load_state_dict(weights)
    for part in parts:
        prefix = _prefix(part)
        part.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return [EpochRecord(**record) for record in header["records"]]


def _prefix(part: Regularizer | WeightAverage) -> str:
    return "average/" if isinstance(part, WeightAverage) else "regularizer/"


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    broken = f"{path} is not a whole checkpoint of a finetuning run. Delete it to start anew, or give another path."
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(broken) from error
    text = metadata.get(_HEADER, "")
    if metadata.get(_DIGEST) != _digest(text, tensors):
        raise TrainingError(broken)
    header = json.loads(text)
    if header["version"] != _VERSION:
        raise TrainingError(f"{path} was written by another version of qcqp-prune. Delete it to start anew.")
    return header, tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of all that a checkpoint says: a damaged file must not be trained on from."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # A checkpoint of an older version knows nothing of newer options, which all do nothing by default.
    found = {**RunIdentity(FinetuneConfig(), 0, ()).to_dict(), **found}
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        what = "; ".join(
            _SHORT[name] if name in _SHORT else f"{name} was {found.get(name)!r} and is now {wanted[name]!r}"
            for name in different
        )
        raise TrainingError(
            f"The checkpoint {path} belongs to another run: {what}. Use the settings of that run to go on with it, "
            "or give another path to start anew."
        )


def _check_shapes(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    different = sorted(found.keys() ^ wanted.keys())
    different += [n for n in wanted if n in found and found[n].shape != wanted[n].shape]
    if different:
        name = different[0]
        shapes = [str(tuple(side[name].shape)) if name in side else "nothing" for side in (found, wanted)]
        raise TrainingError(
            f"The checkpoint {path} belongs to another network: {len(different)} tensors differ, for one {name}, "
            f"{shapes[0]} there and {shapes[1]} in this model. Build that network, or give another path to start anew."
        )


def _tensor_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    extra = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if extra:
        raise TrainingError(
            f"{extra[0]} of the model's state is no tensor, which a checkpoint cannot hold. Train without a checkpoint."
        )
    return dict(state)


def _detached(value: Tensor) -> Tensor:
    # A copy of its own: tied parameters share storage, which safetensors refuses.
    return value.detach().to("cpu", copy=True).clone(memory_format=torch.contiguous_format)
