"""Making networks, inputs, importances and loaders from names. Needs torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from qcqp_prune import data as readers
from qcqp_prune.cli.callables import called, find_callable
from qcqp_prune.cli.config import DataSection
from qcqp_prune.cli.importances import BATCHES, NEED_DATA, ImportanceSection
from qcqp_prune.cli.inputs import InputSection
from qcqp_prune.data import Augmentation, DataSplit
from qcqp_prune.errors import ConfigError, ModelLoadError
from qcqp_prune.graph.batches import is_pair, shown
from qcqp_prune.graph.inputs import ExampleInputs
from qcqp_prune.importance import (
    Activation,
    BatchNormScale,
    Calibrated,
    Concave,
    Fisher,
    GeometricMedian,
    Importance,
    Lamp,
    Magnitude,
    NeuronSensitivity,
    Normalised,
    OutputChange,
    Random,
    Taylor,
)
from qcqp_prune.importance.losses import Loss
from qcqp_prune.models import load_pretrained
from qcqp_prune.train.batches import Loader


def build_model(
    source: str, kwargs: Mapping[str, Any], weights: Path | None = None, *, seed: int = 0
) -> nn.Module:
    """Call what makes the network, and load its weights where there are any.

    Args:
        source: ``package.module:callable`` or ``path/to/file.py:callable``.
        kwargs: its keyword arguments.
        weights: a ``.safetensors`` file, or a state dict written by ``torch.save``.
        seed: of the random initialisation; torch's own state comes back as it was.

    Raises:
        ConfigError: there is no such module or callable, it fails, or it makes something else.
        ModelLoadError: the weights are missing or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = called(source, kwargs, "a network")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{source} makes a {type(model).__name__}: name something that returns a torch.nn.Module"
        )
    return load_weights(model, weights) if weights is not None else model


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a network from a file, only if every name and shape fits.

    Raises:
        ModelLoadError: the file is missing, unreadable, or of another architecture.
    """
    if path.suffix != ".safetensors":
        return load_pretrained(model, path)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelLoadError(
            f"{path} cannot be loaded into {type(model).__name__} ({reason}): give weights of this architecture"
        ) from error
    return model


def example_inputs(wanted: InputSection) -> ExampleInputs:
    """What to trace with: zeros of a shape, whole numbers drawn below a limit, or what a callable makes.

    Raises:
        ConfigError: there is no such dtype or callable, or the callable fails.
    """
    if wanted.source is not None:
        made: ExampleInputs = called(wanted.source, {}, "example inputs")
        return made
    kind = getattr(torch, wanted.dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"no dtype is called {wanted.dtype!r}: write float32, float64, int64 or bool")
    if kind.is_floating_point or kind.is_complex:
        return torch.zeros(wanted.shape, dtype=kind)
    if kind == torch.bool:
        return torch.ones(wanted.shape, dtype=kind)
    # Not one number throughout: that would be taken for a mask, and the network compared on that number alone.
    return torch.randint(wanted.below, wanted.shape, generator=torch.Generator().manual_seed(0)).to(kind)


def make_importance(wanted: ImportanceSection, data: JobData | None = None) -> Importance:
    """The importance that a section names.

    Args:
        wanted: by name, with its variant, and what is made of it.
        data: its training part for those that need some, of which the first batches are taken, and its loss for
            gradients.

    Raises:
        ConfigError: it needs data and there is none.
        InvalidOptionError: it cannot be normalised in the way that is asked for.
    """
    importance = _criterion(wanted, data or JobData())
    if wanted.normalise != "none":
        importance = Normalised(importance, wanted.normalise)
    return importance if wanted.concave is None else Concave(importance, wanted.concave)


def _criterion(wanted: ImportanceSection, data: JobData) -> Importance:
    form: Any = wanted.form
    loader = data.train
    if wanted.name in NEED_DATA:
        if loader is None:
            raise ConfigError(
                f"importance {wanted.name} needs data: name a data set in a config file, or choose magnitude"
            )
        if wanted.name == "calibrated":
            return Calibrated(loader)
        batches = list(itertools.islice(iter(loader), BATCHES if wanted.batches is None else wanted.batches))
        if wanted.name == "taylor":
            return Taylor(batches, data.loss, form=form)
        if wanted.name == "fisher":
            return Fisher(batches, data.loss)
        if wanted.name == "output_change":
            samples = sum(len(batch[1]) for batch in batches if is_pair(batch))
            return OutputChange(batches, samples=max(samples, 1), centred=form == "centred")
        return (
            NeuronSensitivity(batches, form)
            if wanted.name == "neuron_sensitivity"
            else Activation(batches, form)
        )
    if wanted.name == "magnitude":
        return Magnitude(form)
    if wanted.name == "random":
        return Random(wanted.seed or 0)
    plain: dict[str, Callable[[], Importance]] = {
        "batch_norm_scale": BatchNormScale,
        "geometric_median": GeometricMedian,
        "lamp": Lamp,
    }
    return plain[wanted.name]()


@dataclass(frozen=True)
class JobData:
    """What a job trains, scores and measures with.

    Attributes:
        train, validation: loaders, None where there is none.
        loss: what is minimised and measured; cross-entropy where None.
    """

    train: Loader | None = None
    validation: Loader | None = None
    loss: Loss | None = None


def read_data(wanted: DataSection) -> JobData:
    """The data set of a name, or what a callable makes; nothing where a section names neither.

    Args:
        wanted: with paths that can be opened from here.

    Raises:
        ConfigError: a data set needs a folder and none is given; there is no such callable, it fails, or it returns no
            loaders.
        DataError: a file is missing or corrupt.
    """
    loss = None if wanted.loss is None else _loss(wanted.loss)
    if wanted.source is not None:
        return replace(_made(wanted.source, wanted.kwargs), loss=loss)
    if wanted.name == "none":
        return JobData()
    split = _split(wanted.name, wanted.root)
    changes = Augmentation() if wanted.augment else None
    train = split.train.loader(wanted.batch_size, shuffle=True, augment=changes, seed=wanted.seed)
    return JobData(train, split.test.loader(max(wanted.batch_size, 256)), loss)


def _loss(source: str) -> Loss:
    what = "a function of the network's outputs and the targets, such as torch.nn.functional:mse_loss"
    found = find_callable(source, what)
    if isinstance(found, type):
        raise ConfigError(f"{source} is a class: name {what}, or an instance in a file of your own")
    return found


def _split(name: str, root: str | None) -> DataSplit:
    if name == "digits":
        return readers.digits()
    if root is None:
        raise ConfigError(f"[data] {name} is read from files: add root, the folder that holds them")
    return {"cifar10": readers.cifar10, "mnist": readers.mnist, "fashion_mnist": readers.fashion_mnist}[name](
        root
    )


def _made(source: str, kwargs: Mapping[str, Any]) -> JobData:
    """The loaders that a callable makes."""
    wanted = "two loaders, of training and of validation batches, None for the latter if there is none"
    found = called(source, kwargs, wanted)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ConfigError(f"{source} returns {shown(found)}: have it return {wanted}")
    for loader in found:
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise ConfigError(
                f"{source} returns a {type(loader).__name__}, which yields single samples: have it return loaders, "
                "such as torch.utils.data.DataLoader, which yield batches"
            )
    train, validation = found
    if not isinstance(train, Iterable) or not isinstance(validation, Iterable | None):
        raise ConfigError(f"{source} returns {shown(found)}, which are no loaders: have it return {wanted}")
    return JobData(train, validation)
