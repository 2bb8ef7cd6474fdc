"""The configuration of ``qcqp-prune run``: one TOML file, one dataclass for each of its tables."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qcqp_prune.cli.arguments import further_resources
from qcqp_prune.cli.importances import NEED_DATA, ImportanceSection
from qcqp_prune.cli.inputs import InputSection
from qcqp_prune.cli.sections import read_section, require_known, with_environment
from qcqp_prune.errors import ConfigError
from qcqp_prune.program.problem import Resource, all_resources, parse_budgets
from qcqp_prune.program.rounds import Rounds
from qcqp_prune.train import Control, FinetuneConfig, PSPConfig, SPRConfig


@dataclass(frozen=True)
class ModelSection:
    """``source`` makes the network, with ``kwargs``; ``weights`` fills it; ``seed`` is of its initialisation."""

    source: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class DataSection:
    """What is trained, scored and measured with: a data set by name, or loaders of one's own.

    Attributes:
        name: of the data set; ``root``, ``batch_size``, ``augment`` and ``seed`` are of that alone.
        root: the folder of its files.
        source: in place of a name, ``package.module:callable`` or ``file.py:callable`` that returns two loaders, of
            training and of validation batches, or None for the latter.
        kwargs: its keyword arguments, handed over as they are written, paths too.
        loss: ``package.module:callable`` or ``file.py:callable`` of the network's outputs and the targets, a mean over
            samples, which is minimised and measured; cross-entropy where None.

    Raises:
        ConfigError: both a name and a source, or a loss without data.
    """

    name: Literal["digits", "cifar10", "mnist", "fashion_mnist", "none"] = "none"
    root: str | None = None
    batch_size: int = 128
    augment: bool = False
    seed: int = 0
    source: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: str | None = None

    def __post_init__(self) -> None:
        if self.name != "none" and self.source is not None:
            raise ConfigError("[data] has a name and a source: leave one of them out")
        if self.loss is not None and not self.given:
            raise ConfigError('[data] has a loss and no data: add name, or source = "file.py:callable"')

    @property
    def given(self) -> bool:
        """Whether there is any data."""
        return self.name != "none" or self.source is not None


@dataclass(frozen=True)
class TraceSection:
    """What may not be pruned, and how far the rest may go: keywords of ``qcqp_prune.trace``."""

    ignored_layers: tuple[str, ...] = ()
    round_to: int | Mapping[str, int] = 1
    min_keep: int | float | Mapping[str, int | float] = 1
    units: tuple[str, ...] | Mapping[str, Sequence[str]] | None = None
    columns: bool | tuple[str, ...] = False
    sharing: Literal["strict", "free"] = "strict"
    blocks: bool | tuple[str, ...] = False
    uniform: bool | tuple[str, ...] = False


@dataclass(frozen=True)
class SolverSection:
    """A solver by name, and its limits; see ``qcqp_prune.SolveOptions``."""

    name: str = "auto"
    time_limit: float | None = None
    gap_limit: float | None = None
    work_limit: int | None = None
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class ShrinkSection:
    """How the smaller network is made; see ``qcqp_prune.shrink_and_verify``."""

    realisation: Literal["auto", "modules", "graph"] = "auto"


@dataclass(frozen=True)
class TrainingSection:
    """Epochs and a recipe; in the file the keys of ``FinetuneConfig`` stand beside these.

    Attributes:
        epochs: 0 for no training.
        repair: what is done after cutting without training, as for ``Recovery``, or ``none``.
        samples: how many ``reconstruct`` and ``means`` take at most.
        batches: how many batches ``batch_norm`` takes at most.
        checkpoint: a file from which a killed run goes on.
        recipe: the rest of the keys.
        given: names of those that are in the file; in ``[finetune]`` the others are those recommended for the network.
    """

    epochs: int = 0
    repair: Literal["reconstruct", "means", "batch_norm", "none"] = "reconstruct"
    samples: int = 2_500
    batches: int | None = None
    checkpoint: str | None = None
    recipe: FinetuneConfig = field(default_factory=FinetuneConfig)
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class RegularisedSection:
    """Training under a regulariser before the cut; see ``qcqp_prune.Training``.

    In the file the keys of ``Control`` (where ``control`` is true), of ``SPRConfig`` or ``PSPConfig`` and of
    ``FinetuneConfig`` stand beside these.

    Attributes:
        method: none for no such training.
        epochs: of it.
        control: whether prices follow the budgets; otherwise the method's own strength is used.
        bounds: of SPR, as for ``SPR``.
        layers: names or globs of what is regularised; the method's own choice where None.
        checkpoint: a file from which a killed training goes on.
    """

    method: Literal["spr", "psp", "none"] = "none"
    epochs: int = 0
    control: bool = True
    bounds: Literal["running", "fixed"] = "running"
    layers: tuple[str, ...] | None = None
    checkpoint: str | None = None
    steps: Control = field(default_factory=Control)
    regulariser: SPRConfig | PSPConfig = field(default_factory=SPRConfig)
    recipe: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class SweepSection:
    """The pairs of ``qcqp-prune sweep``; ``run`` does not look at them."""

    strengths: tuple[float, ...]
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class ResourcesSection:
    """What resources that need more than a name are made from.

    Attributes:
        latency_table: the file that ``qcqp-prune latency`` wrote; makes ``latency`` a resource.
        accelerator: channels that an engine reads and writes at a time, such as ``8x8``, for ``cycles``.
    """

    latency_table: str | None = None
    accelerator: str | None = None

    def made(self, folder: Path) -> list[Resource]:
        """The resources themselves; the file is relative to a folder."""
        table = None if self.latency_table is None else folder / Path(self.latency_table).expanduser()
        return further_resources(table, self.accelerator)


@dataclass(frozen=True)
class OutputSection:
    """The folder that gets ``report.json`` and the smaller network."""

    folder: str = "qcqp-prune-out"


@dataclass(frozen=True)
class RunConfig:
    """A whole job.

    Attributes:
        folder: of the configuration file; paths in it are relative to that.
        pretrain: training of the dense network, for one that comes without weights.
        training: training under a regulariser.
        sweep: pairs of strength and alpha to try; None without.
        budgets: None where that goes by its rule alone.
        importance: None for the default.
        rounds: of gradual pruning; None to prune at once.
        finetune: what follows the cut.
    """

    folder: Path
    model: ModelSection
    input: InputSection
    budgets: Mapping[str, int | float | str] | None
    resources: ResourcesSection
    data: DataSection
    pretrain: TrainingSection
    trace: TraceSection
    training: RegularisedSection
    sweep: SweepSection | None
    importance: ImportanceSection | None
    solver: SolverSection
    shrink: ShrinkSection
    rounds: Rounds | None
    finetune: TrainingSection
    output: OutputSection

    def path(self, text: str) -> Path:
        """A path of the file, relative to where the file lies."""
        return self.folder / Path(text).expanduser()

    def source(self, text: str) -> str:
        """``file.py:callable`` with the path of the file; ``package.module:callable`` as it is."""
        file, _, name = text.rpartition(":")
        return f"{self.path(file)}:{name}" if file.endswith(".py") else text


SECTIONS = (
    "model",
    "input",
    "budgets",
    "resources",
    "data",
    "pretrain",
    "trace",
    "training",
    "sweep",
    "importance",
    "solver",
    "shrink",
    "rounds",
    "finetune",
    "output",
)


def read_config(path: Path) -> RunConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file is missing or no TOML, a table or key is unknown (the nearest is suggested) or missing, a
            value has the wrong type, or an environment variable is not set.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the configuration {path} cannot be read ({error.strerror}): give a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}): correct it") from error
    for name in raw:
        require_known(name, list(SECTIONS), f"table [{name}] in {path.name}")
    tables = with_environment(raw, "")
    training = _regularised(tables.get("training", {}))
    by_rule = training.method != "none" and not training.control
    for name in ("model", "input", "budgets"):
        if name not in raw and not (name == "budgets" and by_rule):
            raise ConfigError(f"{path.name} has no table [{name}]: add it")
    resources = read_section(ResourcesSection, tables.get("resources", {}), "resources")
    further = resources.made(path.absolute().parent)
    data = _data(tables.get("data", {}))
    config = RunConfig(
        folder=path.absolute().parent,
        model=read_section(ModelSection, tables["model"], "model"),
        input=read_section(InputSection, tables["input"], "input"),
        budgets=_budgets(tables["budgets"], further) if "budgets" in tables else None,
        resources=resources,
        data=data,
        pretrain=_training(tables.get("pretrain", {}), "pretrain", FinetuneConfig.from_scratch()),
        trace=read_section(TraceSection, tables.get("trace", {}), "trace"),
        training=training,
        sweep=read_section(SweepSection, tables["sweep"], "sweep") if "sweep" in tables else None,
        importance=_importance(tables["importance"], data) if "importance" in tables else None,
        solver=read_section(SolverSection, tables.get("solver", {}), "solver"),
        shrink=read_section(ShrinkSection, tables.get("shrink", {}), "shrink"),
        rounds=read_section(Rounds, tables["rounds"], "rounds") if "rounds" in tables else None,
        finetune=_training(tables.get("finetune", {}), "finetune", FinetuneConfig()),
        output=read_section(OutputSection, tables.get("output", {}), "output"),
    )
    _require_data(config)
    return config


def _data(table: object) -> DataSection:
    """What is of one kind of data only is refused beside the other, where it would change nothing."""
    found = read_section(DataSection, table, "data")
    assert isinstance(table, Mapping)  # else it was refused
    own = {"root", "batch_size", "augment", "seed"} if found.source is not None else {"kwargs"}
    if idle := sorted(own & set(table)):
        what = "a data set by name, not a source" if found.source is not None else "a source"
        raise ConfigError(
            f"[data] {idle[0]} is of {what}: leave it out"
            + (", or hand it over in kwargs" if found.source is not None else "")
        )
    return found


def _budgets(table: object, further: Sequence[Resource]) -> Mapping[str, int | float | str]:
    """The budgets as written, read once already: a typing error should not wait for the training to end."""
    if not isinstance(table, Mapping) or not table:
        raise ConfigError('[budgets] is empty: write one such as macs = "50%"')
    parse_budgets(dict(table), all_resources(further))
    return dict(table)


def _training(table: object, where: str, base: FinetuneConfig) -> TrainingSection:
    """Keys of the section and keys of the recipe stand side by side in the file."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[{where}] is {table!r}: write a table of key = value")
    own = {"epochs", "repair", "samples", "batches", "checkpoint"} if where == "finetune" else {"epochs"}
    keys = [*sorted(own), *FinetuneConfig.__dataclass_fields__]
    for key in table:
        require_known(key, keys, f"key {key!r} in [{where}]")
    recipe = read_section(FinetuneConfig, {k: v for k, v in table.items() if k not in own}, where, base=base)
    mine = read_section(TrainingSection, {k: v for k, v in table.items() if k in own}, where)
    return replace(mine, recipe=recipe, given=tuple(k for k in table if k not in own))


def _importance(table: object, data: DataSection) -> ImportanceSection:
    """A table without a name says something of the importance that ``prune`` takes when it is given none."""
    default = "calibrated" if data.given else "magnitude"
    table = {"name": default, **table} if isinstance(table, Mapping) else table
    return read_section(ImportanceSection, table, "importance")


def _regularised(table: object) -> RegularisedSection:
    """Keys of the section, of the controller, of the method and of the recipe stand side by side in the file."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[training] is {table!r}: write a table of key = value")
    own = set(RegularisedSection.__dataclass_fields__) - {"steps", "regulariser", "recipe"}
    mine = read_section(RegularisedSection, {k: v for k, v in table.items() if k in own}, "training")
    if mine.method == "none":
        if table.keys() - {"method"}:
            raise ConfigError('[training] has no method: add method = "spr" or method = "psp"')
        return mine
    # Networks that are trained already start with all structures there.
    spr = SPRConfig(structure="units" if mine.control else "filters")
    base = spr if mine.method == "spr" else PSPConfig("channel", spread=None)
    strength = "strength" if mine.method == "spr" else "l1"
    parts: dict[str, tuple[Any, set[str]]] = {
        "recipe": (FinetuneConfig(), set(FinetuneConfig.__dataclass_fields__)),
        "regulariser": (base, set(base.__dataclass_fields__)),
        "steps": (Control(), set(Control.__dataclass_fields__) if mine.control else set()),
    }
    if mine.control and strength in table:
        raise ConfigError(
            f"[training] {strength} is found by the control: leave it out, or add control = false"
        )
    known = sorted(own.union(*(keys for _, keys in parts.values())))
    for key in table:
        require_known(key, known, f"key {key!r} in [training] with method {mine.method}")
    made = {
        name: read_section(type(start), {k: v for k, v in table.items() if k in keys}, "training", base=start)
        for name, (start, keys) in parts.items()
    }
    return replace(mine, **made)


def _require_data(config: RunConfig) -> None:
    """Refuse rounds beside a training, and training and scores that need data where none is named."""
    if config.rounds is not None and config.training.method != "none":
        raise ConfigError("[rounds] and [training] at once: leave one of them out")
    if config.data.given:
        return
    wants = [f"[{n}] epochs" for n in ("pretrain", "finetune") if getattr(config, n).epochs]
    wants += ["[rounds] epochs"] if config.rounds is not None and config.rounds.epochs else []
    wants += ["[training]"] if config.training.method != "none" else []
    scored = config.importance
    wants += [f"[importance] {scored.name}"] if scored and scored.name in NEED_DATA else []
    if wants:
        raise ConfigError(f"{' and '.join(wants)} need data and [data] names none: add [data] name or source")
