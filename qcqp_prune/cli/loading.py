"""Making networks, inputs, importances and loaders from names. Needs torch."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qcqp_prune import data as readers
from qcqp_prune.cli.arguments import nearest
from qcqp_prune.cli.importances import NEED_DATA, ImportanceSection
from qcqp_prune.cli.inputs import InputSection
from qcqp_prune.data import Augmentation, DataSplit
from qcqp_prune.errors import ConfigError, ModelLoadError, QcqpPruneError
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
    make = find_callable(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make(**kwargs)
        except QcqpPruneError:
            raise
        except Exception as error:  # whatever a user's constructor raises
            arguments = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
            raise ConfigError(
                f"{source}({arguments}) fails with {type(error).__name__}: {error}. Check its arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{source} makes a {type(model).__name__}: name something that returns a torch.nn.Module"
        )
    return load_weights(model, weights) if weights is not None else model


def find_callable(source: str) -> Callable[..., Any]:
    """What ``package.module:callable`` or ``file.py:callable`` names.

    Raises:
        ConfigError: there is no such thing.
    """
    where, colon, name = source.rpartition(":")
    if not colon or not where or not name:
        raise ConfigError(
            f"model {source!r} cannot be read: write package.module:callable or file.py:callable"
        )
    module = _module_in_file(Path(where)) if where.endswith(".py") else _module_called(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{where} has no {name!r}: {nearest(part, dir(found))}Name a callable in it")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"{source} is a {type(found).__name__}: name a class or function that returns a network"
        )
    return found  # type: ignore[no-any-return]


def _module_called(name: str) -> ModuleType:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that a user's own module is found
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"module {name!r} cannot be imported ({error}): install it, or run where it lies"
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(
            f"module {name!r} fails on import with {type(error).__name__}: {error}. Repair it"
        ) from error


def _module_in_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ConfigError(
            f"there is no file {path}{where}: give the path of the Python file that makes the network"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(
            f"{path} fails on import with {type(error).__name__}: {error}. Repair it"
        ) from error
    return module


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
        make = find_callable(wanted.source)
        try:
            return make()
        except Exception as error:  # whatever a user's function raises
            raise ConfigError(
                f"{wanted.source}() fails with {type(error).__name__}: {error}. It takes no arguments and returns "
                "example inputs"
            ) from error
    kind = getattr(torch, wanted.dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"no dtype is called {wanted.dtype!r}: write float32, float64, int64 or bool")
    if kind.is_floating_point or kind.is_complex:
        return torch.zeros(wanted.shape, dtype=kind)
    if kind == torch.bool:
        return torch.ones(wanted.shape, dtype=kind)
    # Not one number throughout: that would be taken for a mask, and the network compared on that number alone.
    return torch.randint(wanted.below, wanted.shape, generator=torch.Generator().manual_seed(0)).to(kind)


def make_importance(wanted: ImportanceSection, loader: Loader | None = None) -> Importance:
    """The importance that a section names.

    Args:
        wanted: by name, with its variant, and what is made of it.
        loader: training data for those that need some, of which the first batches are taken.

    Raises:
        ConfigError: it needs data and there is none.
        InvalidOptionError: it cannot be normalised in the way that is asked for.
    """
    importance = _criterion(wanted, loader)
    if wanted.normalise != "none":
        importance = Normalised(importance, wanted.normalise)
    return importance if wanted.concave is None else Concave(importance, wanted.concave)


def _criterion(wanted: ImportanceSection, loader: Loader | None) -> Importance:
    form: Any = wanted.form
    if wanted.name in NEED_DATA:
        if loader is None:
            raise ConfigError(
                f"importance {wanted.name} needs data: name a data set in a config file, or choose magnitude"
            )
        if wanted.name == "calibrated":
            return Calibrated(loader)
        batches = list(itertools.islice(iter(loader), wanted.batches))
        if wanted.name == "taylor":
            return Taylor(batches, form=form)
        if wanted.name == "fisher":
            return Fisher(batches)
        if wanted.name == "output_change":
            samples = sum(len(targets) for _, targets in batches)
            return OutputChange(batches, samples=samples, centred=form == "centred")
        return (
            NeuronSensitivity(batches, form)
            if wanted.name == "neuron_sensitivity"
            else Activation(batches, form)
        )
    if wanted.name == "magnitude":
        return Magnitude(form)
    if wanted.name == "random":
        return Random(wanted.seed)
    plain: dict[str, Callable[[], Importance]] = {
        "batch_norm_scale": BatchNormScale,
        "geometric_median": GeometricMedian,
        "lamp": Lamp,
    }
    return plain[wanted.name]()


def read_data(name: str, root: str | None) -> DataSplit | None:
    """The data set of that name, None for ``none``.

    Raises:
        ConfigError: it needs a folder and none is given.
        DataError: a file is missing or corrupt.
    """
    if name == "none":
        return None
    if name == "digits":
        return readers.digits()
    if root is None:
        raise ConfigError(f"[data] {name} is read from files: add root, the folder that holds them")
    return {"cifar10": readers.cifar10, "mnist": readers.mnist, "fashion_mnist": readers.fashion_mnist}[name](
        root
    )


def loaders(
    split: DataSplit | None, batch_size: int, *, augment: bool, seed: int
) -> tuple[Loader | None, Loader | None]:
    """Loaders of the training and the test part."""
    if split is None:
        return None, None
    changes = Augmentation() if augment else None
    train = split.train.loader(batch_size, shuffle=True, augment=changes, seed=seed)
    return train, split.test.loader(max(batch_size, 256))
