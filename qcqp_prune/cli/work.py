"""Doing a job: everything between a checked configuration and the files in the output folder. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qcqp_prune.apply.plan import load, require_place, save
from qcqp_prune.apply.verification import Verification
from qcqp_prune.cli.config import RunConfig
from qcqp_prune.cli.console import ERR, OUT, Spinner, TraceBar, show_ranges, wrote, wrote_certificate
from qcqp_prune.cli.loading import JobData, build_model, example_inputs, make_importance, read_data
from qcqp_prune.continuous import Training, unscored
from qcqp_prune.errors import ConfigError, VerificationError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.inputs import ExampleInputs, make_inputs
from qcqp_prune.graph.state import eval_mode
from qcqp_prune.graph.trace import trace
from qcqp_prune.grid import SweepRow, sweep
from qcqp_prune.pipeline import prune
from qcqp_prune.recovery import Recovery
from qcqp_prune.report import PruneReport, Regularised
from qcqp_prune.report.terminal import report_view
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import TracePoint
from qcqp_prune.storage import read_json, require_file_place
from qcqp_prune.train import Evaluation, FinetuneConfig, finetune
from qcqp_prune.watch import Watcher

_SAYS = {
    "score": "scoring its channels",
    "solve": "solving",
    "shrink": "cutting and verifying",
    "repair": "repairing the smaller network",
    "evaluate": "measuring accuracy",
}


def run_job(config: RunConfig, output: Path, certificate: Path | None = None) -> PruneReport:
    """Do the whole job, and write ``report.json`` and the smaller network into a folder.

    Args:
        config: what to do.
        output: the folder.
        certificate: where to write what proves the bound; nowhere if None.

    Raises:
        QcqpPruneError: whatever stands in its way.
    """
    if config.solver.name != "auto":
        get_backend(config.solver.name)  # a solver that is not there is said before anything is trained
    require_place(output / "model")
    require_file_place(output / "report.json")
    if certificate is not None:
        if config.rounds is not None and config.rounds.count > 1:
            raise ConfigError(
                "a certificate is of one problem, and in rounds each bound is of what the round before left: leave "
                "--certificate or [rounds] out"
            )
        require_file_place(certificate)
    options = _options(config)
    data = _data(config)
    wanted = config.importance
    importance = None if wanted is None else make_importance(wanted, data)
    training = _training(config, data)
    model = _built(config)
    recovery = _recovery(config, model, data)
    _pretrain(config, model, data)
    with Spinner().running() as spinner, TraceBar().closing() as bar:
        small, report = prune(
            model,
            _inputs(config),
            budgets=config.budgets,
            training=training,
            importance=importance,
            resources=config.resources.made(config.folder),
            solver=config.solver.name,
            **vars(config.trace),
            rounds=config.rounds,
            realisation=config.shrink.realisation,
            options=options,
            recovery=recovery,
            watch=_ConsoleWatcher(spinner, bar, certificate),
        )
    OUT.print(report_view(report))
    _write(report, small, model, output)
    return report


def sweep_job(config: RunConfig, results: Path) -> Iterator[SweepRow]:
    """Try the pairs of a configuration one after another; each row goes into a file when it is done.

    Raises:
        ConfigError: the configuration has no pairs, no training by the published rule, or scores of its own.
        QcqpPruneError: whatever stands in its way.
    """
    wishes = config.sweep
    if wishes is None or config.training.method != "spr" or config.training.control:
        raise ConfigError(
            'a sweep needs [sweep] with strengths and alphas, and [training] with method = "spr" and control = false'
        )
    if config.importance is not None:
        raise ConfigError("a sweep goes by the rule of SPR: leave [importance] out")
    require_file_place(results)
    data = _data(config)
    training = _training(config, data)
    assert training is not None  # a configuration with a method has data
    model = _built(config)
    recovery = _recovery(config, model, data)
    _pretrain(config, model, data)
    return sweep(
        model,
        _inputs(config),
        training,
        strengths=wishes.strengths,
        alphas=wishes.alphas,
        recovery=recovery,
        results=results,
        budgets=config.budgets,
        resources=config.resources.made(config.folder),
        solver=config.solver.name,
        realisation=config.shrink.realisation,
        options=_options(config),
        **vars(config.trace),
    )


def _data(config: RunConfig) -> JobData:
    """What the configuration trains and measures with, paths taken from where its file lies."""
    wanted = config.data
    return read_data(
        replace(
            wanted,
            root=None if wanted.root is None else str(config.path(wanted.root)),
            source=None if wanted.source is None else config.source(wanted.source),
            loss=None if wanted.loss is None else config.source(wanted.loss),
        )
    )


def _built(config: RunConfig) -> nn.Module:
    """The network of the configuration, with its weights where it has some."""
    weights = None if config.model.weights is None else config.path(config.model.weights)
    return build_model(
        config.source(config.model.source), config.model.kwargs, weights, seed=config.model.seed
    )


def _inputs(config: RunConfig) -> ExampleInputs:
    """What the configuration has the network traced with."""
    wanted = config.input
    return example_inputs(
        wanted if wanted.source is None else replace(wanted, source=config.source(wanted.source))
    )


def _pretrain(config: RunConfig, model: nn.Module, data: JobData) -> None:
    """Train the network before it is pruned, where the configuration says so."""
    if config.pretrain.epochs and data.train is not None:
        _rehearse(config, model)
        OUT.print(f"training {type(model).__name__} for {config.pretrain.epochs} epochs", highlight=False)
        finetune(
            model,
            data.train,
            epochs=config.pretrain.epochs,
            config=_shown(config.pretrain.recipe),
            loss=data.loss,
        )


def _rehearse(config: RunConfig, model: nn.Module) -> None:
    """Trace the network and try the budgets before it is trained: neither asks for its weights.

    Raises:
        QcqpPruneError: what would otherwise be said when the training is over.
    """
    with TraceBar().running() as bar:
        graph = trace(
            model,
            _inputs(config),
            **vars(config.trace),
            progress=bar.show,
        )
    resources = config.resources.made(config.folder)
    unscored(graph, config.budgets, resources)


def _training(config: RunConfig, data: JobData) -> Training | None:
    """The training under a regulariser, where the configuration has one."""
    wishes = config.training
    if wishes.method == "none" or data.train is None:
        return None
    return Training(
        data.train,
        wishes.epochs,
        wishes.regulariser,
        control=wishes.steps if wishes.control else None,
        bounds=wishes.bounds,
        layers=wishes.layers,
        config=_shown(wishes.recipe),
        checkpoint=None if wishes.checkpoint is None else config.path(wishes.checkpoint),
        loss=data.loss,
    )


def _options(config: RunConfig) -> SolveOptions:
    wishes = config.solver
    base = SolveOptions(
        time_limit=wishes.time_limit, work_limit=wishes.work_limit, seed=wishes.seed, threads=wishes.threads
    )
    return base if wishes.gap_limit is None else replace(base, gap_limit=wishes.gap_limit)


def _recovery(config: RunConfig, model: nn.Module, data: JobData) -> Recovery:
    wishes = config.finetune
    recipe = FinetuneConfig.recommended(model)
    recipe = replace(recipe, **{name: getattr(wishes.recipe, name) for name in wishes.given})
    return Recovery(
        validation=data.validation,
        train=data.train,
        repair=None if wishes.repair == "none" else wishes.repair,
        samples=wishes.samples,
        batches=wishes.batches,
        epochs=wishes.epochs,
        config=_shown(recipe),
        checkpoint=None if wishes.checkpoint is None else config.path(wishes.checkpoint),
        loss=data.loss,
    )


def _shown(recipe: FinetuneConfig) -> FinetuneConfig:
    """The recipe with a progress bar where someone can see it."""
    return replace(recipe, progress=recipe.progress or ERR.is_terminal)


def _write(report: PruneReport, small: nn.Module, dense: nn.Module, output: Path) -> None:
    """Write the results, and read the network back: what lies on the disk must compute the same."""
    assert report.graph is not None  # prune() always sets it
    folder = save(small, output / "model", graph=report.graph, masks=report.masks)
    again = load(folder, dense)
    args, kwargs = make_inputs(report.graph, seed=1, device=next(small.parameters()).device)
    with torch.no_grad(), eval_mode(small), eval_mode(again):
        outputs = pytree.tree_leaves((small(*args, **kwargs), again(*args, **kwargs)))
    half = len(outputs) // 2
    same = all(
        torch.equal(a, b)
        for a, b in zip(outputs[:half], outputs[half:], strict=True)
        if isinstance(a, torch.Tensor)
    )
    if not same:
        raise VerificationError(
            f"the network read back from {folder} computes something else: report it with the model"
        )
    report.write(output / "report.json")
    wrote("the smaller network (read back: the same outputs, bit for bit)", folder)
    wrote("the report", output / "report.json")


class _ConsoleWatcher(Watcher):
    """Says on the terminal what happens."""

    def __init__(self, spinner: Spinner, bar: TraceBar, certificate: Path | None = None) -> None:
        self._spinner, self._bar, self._certificate = spinner, bar, certificate

    def phase(self, name: str) -> None:
        self._bar.stop()
        if name == "trace":
            self._spinner.pause()
            self._bar.start()
        elif name in ("train", "finetune"):
            self._spinner.pause()  # it has a progress bar of its own
        else:
            self._spinner.say(_SAYS[name])

    def tracing(self, what: str, done: int, total: int) -> None:
        self._bar.show(what, done, total)

    def traced(self, graph: ChannelGraph) -> None:
        self._bar.stop()
        show_ranges(graph)

    def progress(self, point: TracePoint) -> None:
        self._spinner.progress(point)

    def round(self, number: int, count: int) -> None:
        self._spinner.pause()
        OUT.print(f"round {number} of {count}", highlight=False)

    def trained(self, training: Regularised) -> None:
        end = f", relaxed budgets exceeded by {training.trace[-1].violation:.2%}" if training.trace else ""
        OUT.print(f"trained under {training.method}{end}", highlight=False)

    def solved(self, report: SolveReport) -> None:
        """Before anything is finetuned; a selection that an interrupted run left has its certificate from then."""
        if self._certificate is None:
            return
        if report.certificate is None and _is_of(self._certificate, report):
            OUT.print(f"{self._certificate} is the certificate of this selection", highlight=False)
        else:
            wrote_certificate(report, self._certificate)

    def verified(self, checked: Verification) -> None:
        OUT.print(
            f"cut and verified: {', '.join(f'{c.resource} {c.measured:,}' for c in checked.counts)}",
            highlight=False,
        )

    def evaluated(self, step: str, result: Evaluation) -> None:
        if result.accuracy is not None:
            OUT.print(f"accuracy {step}: {result.accuracy:.2%} of {result.samples:,}", highlight=False)
        else:
            OUT.print(f"loss {step}: {result.loss:.6g} over {result.samples:,}", highlight=False)


def _is_of(certificate: Path, report: SolveReport) -> bool:
    """Whether a certificate is there, and of a report's selection."""
    if not certificate.exists():
        return False
    selection = read_json(certificate, "a certificate").get("selection", {})
    return bool(selection.get("objective") == report.objective)
