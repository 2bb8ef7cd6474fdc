"""Whole jobs: ``run`` does what a configuration says, ``demo`` shows everything on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcqp_prune.cli.arguments import parse_budgets

if TYPE_CHECKING:
    from qcqp_prune.cli.config import RunConfig

DEMO = """
[model]
source = "qcqp_prune.models:DigitsNet"

[input]
shape = [1, 1, 8, 8]

[data]
name = "digits"
batch_size = 64

[pretrain]
epochs = 30

[budgets]
macs = "50%"

[solver]
time_limit = 40

[finetune]
epochs = 40
lr = 0.02
weight_decay = 5e-3
schedule = "cosine"
warmup = 1.0
"""


def run(
    config: Annotated[Path, typer.Argument(help="A TOML file; see the examples folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results, instead of the file's.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Write what proves the bound, for `qcqp-prune certify`.")
    ] = None,
) -> None:
    """Prune a network as a configuration file says: train or load, solve, cut, verify, finetune, report, save."""
    from qcqp_prune.cli.config import read_config
    from qcqp_prune.cli.work import run_job

    job = read_config(config)
    run_job(job, output or job.path(job.output.folder), certificate)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "qcqp-prune-demo"
    ),
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="resource=limit, or a share of the MACs.")
    ] = "macs=50%",
    seed: Annotated[int, typer.Option(help="Of training and solving.")] = 0,
) -> None:
    """Train a small network on handwritten digits, prune it to half its multiply-adds with a proof, and finetune it."""
    import torch

    from qcqp_prune.cli.work import run_job

    threads = torch.get_num_threads()
    # Tensors this small are slower with more threads, and with one results repeat.
    torch.set_num_threads(1)
    try:
        run_job(_demo_config(budget, seed), output)
    finally:
        torch.set_num_threads(threads)


def _demo_config(budget: str, seed: int) -> RunConfig:
    import tempfile
    from dataclasses import replace

    from qcqp_prune.cli.config import read_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.toml"
        path.write_text(DEMO, encoding="utf-8")
        config = read_config(path)
    return replace(
        config,
        budgets=parse_budgets([budget]),
        model=replace(config.model, seed=seed),
        data=replace(config.data, seed=seed),
        solver=replace(config.solver, seed=seed),
        pretrain=replace(config.pretrain, recipe=replace(config.pretrain.recipe, seed=seed)),
        finetune=replace(
            config.finetune,
            recipe=replace(config.finetune.recipe, seed=seed),
            given=(*config.finetune.given, "seed"),
        ),
    )
