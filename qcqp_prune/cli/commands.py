"""The single steps, which read and write files: ``trace``, ``solve``, ``shrink``, ``report`` and ``solvers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qcqp_prune.cli.arguments import (
    further_resources,
    parse_amount,
    parse_budgets,
    parse_globs,
    parse_kwargs,
    parse_shape,
    parse_units,
)
from qcqp_prune.cli.console import OUT, Spinner, TraceBar, show_ranges, wrote, wrote_certificate
from qcqp_prune.cli.importances import parse_importance
from qcqp_prune.cli.inputs import InputSection
from qcqp_prune.errors import ConfigError, PlanError
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.files import TracedNetwork, read_traced, write_traced
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.report import PruneReport
from qcqp_prune.report.terminal import (
    frozen_lines,
    report_view,
    solve_lines,
    solvers_table,
    usage_table,
    verification_lines,
)
from qcqp_prune.solve.backend import available_solvers
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.run import solve as solve_problem
from qcqp_prune.storage import read_json, require_file_place, write_json

Source = Annotated[
    str, typer.Argument(help="What makes the network: package.module:callable or file.py:callable.")
]
Kwargs = Annotated[
    list[str] | None, typer.Option("--kwarg", help="name=value for the callable, value in JSON or text.")
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights to load: .safetensors, or a state dict of torch.save.")
]
InputShape = Annotated[
    str | None, typer.Option(help="Shape of the one example input, batch first: 1,3,32,32.")
]
InputDtype = Annotated[str, typer.Option(help="Of that input: float32, float64, int64, bool.")]
InputBelow = Annotated[
    int, typer.Option(help="Whole numbers are drawn below this one, such as the number of tokens.")
]
Inputs = Annotated[
    str | None,
    typer.Option(
        help="Instead of a shape: package.module:callable or file.py:callable that returns example inputs, a tuple of "
        "arguments or a dict of keyword arguments."
    ),
]
GraphFile = Annotated[Path, typer.Argument(help="The file that `trace` wrote; its scores lie beside it.")]


def trace(
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The graph file; the scores go beside it.")],
    input_shape: InputShape = None,
    input_dtype: InputDtype = "float32",
    input_below: InputBelow = 10,
    inputs: Inputs = None,
    kwarg: Kwargs = None,
    weights: Weights = None,
    model_seed: Annotated[int, typer.Option(help="Of the random initialisation.")] = 0,
    importance: Annotated[
        str,
        typer.Option(
            help="magnitude, magnitude:authors, magnitude:l2, batch_norm_scale, geometric_median, lamp, random, "
            "random:SEED. Those that need data are for configuration files."
        ),
    ] = "magnitude",
    normalise: Annotated[
        Literal["none", "layer", "macs", "group"], typer.Option(help="What is brought to one scale.")
    ] = "none",
    concave: Annotated[
        float | None,
        typer.Option(help="Gains fall the more of a group is kept: a power from 0 (logarithm) to 1 (a sum)."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layer name or glob whose outputs are kept.")
    ] = None,
    round_to: Annotated[
        list[str] | None,
        typer.Option(help="Kept channels are a multiple of this, or all: 8, or LAYER_GLOB=8. May repeat."),
    ] = None,
    min_keep: Annotated[
        list[str] | None,
        typer.Option(help="Least kept channels of a layer: 4, a share 0.1, or LAYER_GLOB=4. May repeat."),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of units that may go: widths, heads, head_dim, experts, stream; or LAYER_GLOB=kinds. "
            "widths,heads,experts if not given. May repeat."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer name or glob whose kernel columns may go one by one; '*' for all. May repeat."
        ),
    ] = None,
    sharing: Annotated[
        Literal["strict", "free"],
        typer.Option(help="Tensors that are added keep the same channels, or their own."),
    ] = "strict",
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="Residual branch, name or glob, that may go as a whole; '*' for all. May repeat."),
    ] = None,
    uniform: Annotated[
        list[str] | None,
        typer.Option(
            help="Glob of layers that keep equally many units; '*' ties layers whose names differ in numbers only. "
            "May repeat."
        ),
    ] = None,
) -> None:
    """Find what can be removed from a network, score it, and write both to files that need no torch."""
    from qcqp_prune.cli.loading import build_model, example_inputs, make_importance
    from qcqp_prune.graph.trace import trace as trace_model

    require_file_place(output)
    scored = parse_importance(importance, normalise, concave)
    wanted = InputSection(parse_shape(input_shape), input_dtype, input_below, inputs)
    kwargs = parse_kwargs(kwarg or [])
    origin = {
        "source": model,
        "kwargs": kwargs,
        "weights": str(weights) if weights else None,
        "seed": model_seed,
    }
    network = build_model(model, kwargs, weights, seed=model_seed)
    with TraceBar().running() as bar:
        graph = trace_model(
            network,
            example_inputs(wanted),
            ignored_layers=ignore or (),
            round_to=parse_amount("--round-to", round_to or []),
            min_keep=parse_amount("--min-keep", min_keep or []),
            units=parse_units(units or []),
            columns=parse_globs(columns or []),
            sharing=sharing,
            blocks=parse_globs(blocks or []),
            uniform=parse_globs(uniform or []),
            progress=bar.show,
        )
    objective = make_importance(scored)(network, graph)
    show_ranges(graph)
    path, scores = write_traced(output, TracedNetwork(graph, objective, origin))
    OUT.print(
        f"{graph.model}: {len(graph.layers)} layers, {graph.prunable_count} units that may go",
        highlight=False,
    )
    for line in frozen_lines(graph):
        OUT.print(line)
    wrote("the graph", path)
    wrote("the scores", scores)


def solve(
    graph: GraphFile,
    budget: Annotated[
        list[str], typer.Option("--budget", "-b", help="resource=limit: macs=50%, params=2M. May repeat.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The masks, with the whole record of the solve.")
    ],
    solver: Annotated[str, typer.Option(help="auto, or a name from `qcqp-prune solvers`.")] = "auto",
    time_limit: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    gap_limit: Annotated[float | None, typer.Option(help="Stop at this relative gap.")] = None,
    work_limit: Annotated[int | None, typer.Option(help="In the solver's own unit, such as nodes.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    threads: Annotated[int, typer.Option(help="Most threads to use.")] = 1,
    warm_start: Annotated[Path | None, typer.Option(help="Masks of an earlier solve to start from.")] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="What `latency` wrote; makes latency=... a budget, in ns.")
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(help="Channels read x written at a time, for cycles=...: 8x8. 4x4 if not given."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Write what proves the bound, for `qcqp-prune certify`.")
    ] = None,
) -> None:
    """Choose what to keep. Needs no torch."""
    require_file_place(output)
    resources = further_resources(latency_table, accelerator)
    if certificate is not None:
        require_file_place(certificate)
    traced = read_traced(graph)
    show_ranges(traced.graph, resources)
    budgets = parse_budgets(budget)
    problem = PruningProblem.build(traced.graph, traced.objective, budgets, resources=resources)
    start = None if warm_start is None else read_masks(warm_start)
    with Spinner().running() as spinner:
        options = SolveOptions(work_limit=work_limit, on_event=spinner.progress)
        report = solve_problem(
            problem,
            solver,
            time_limit=time_limit,
            gap_limit=gap_limit,
            seed=seed,
            threads=threads,
            warm_start=start,
            options=options,
        )
    _show_solve(report)
    wrote("the masks", write_json(output, report.to_json()))
    if certificate is not None:
        wrote_certificate(report, certificate)


def latency(
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table, as JSON.")],
    input_shape: InputShape = None,
    input_dtype: InputDtype = "float32",
    input_below: InputBelow = 10,
    inputs: Inputs = None,
    kwarg: Kwargs = None,
    points: Annotated[int, typer.Option(help="Widths of each layer to time, in each direction.")] = 8,
    repeats: Annotated[int, typer.Option(help="Runs of each; the median counts.")] = 7,
) -> None:
    """Time the layers of a network on this machine at several widths, for budgets such as latency=50%."""
    from qcqp_prune.cli.loading import build_model, example_inputs
    from qcqp_prune.graph.trace import trace as trace_model
    from qcqp_prune.resources.timing import measure_latency

    require_file_place(output)
    wanted = InputSection(parse_shape(input_shape), input_dtype, input_below, inputs)
    network = build_model(model, parse_kwargs(kwarg or []))
    examples = example_inputs(wanted)
    with TraceBar().running() as bar:
        graph = trace_model(network, examples, progress=bar.show)
    with Spinner().running() as spinner:
        spinner.say("timing layers")
        table = measure_latency(network, graph, examples, points=points, repeats=repeats)
    for note in table.notes:
        OUT.print(note, highlight=False)
    wrote("the latency table", table.save(output))


def shrink(
    graph: GraphFile,
    masks: Annotated[Path, typer.Argument(help="The file that `solve` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the smaller network.")],
    model: Annotated[str | None, typer.Option(help="What makes the network, where not as traced.")] = None,
    kwarg: Kwargs = None,
    weights: Weights = None,
    realisation: Annotated[str, typer.Option(help="auto, modules or graph.")] = "auto",
) -> None:
    """Cut the network as the masks say, verify it, and save it without pickle."""
    if realisation not in ("auto", "modules", "graph"):
        raise ConfigError(f"--realisation {realisation!r}: choose auto, modules or graph")
    from qcqp_prune.apply.plan import require_place, save
    from qcqp_prune.apply.shrink import shrink_and_verify
    from qcqp_prune.cli.loading import build_model

    require_place(output)
    traced, kept = read_traced(graph), read_masks(masks)
    origin = dict(traced.origin)
    source = model or origin.get("source")
    if not source:
        raise ConfigError(
            f"{graph} does not say what makes the network: give --model package.module:callable"
        )
    kwargs: dict[str, Any] = parse_kwargs(kwarg) if kwarg else dict(origin.get("kwargs") or {})
    file = weights or (Path(origin["weights"]) if origin.get("weights") else None)
    network = build_model(source, kwargs, file, seed=int(origin.get("seed") or 0))
    small, checked = shrink_and_verify(network, traced.graph, kept, realisation=realisation)  # type: ignore[arg-type]
    for line in verification_lines(checked):
        OUT.print(line)
    wrote("the smaller network", save(small, output, graph=traced.graph, masks=kept))


def report(
    file: Annotated[
        Path, typer.Argument(help="report.json, a folder that holds one, or what `solve` wrote.")
    ],
) -> None:
    """Show a report."""
    path = file / "report.json" if file.is_dir() else file
    data = read_json(path, "a report")
    if "format" not in data and "termination" in data:
        _show_solve(SolveReport.from_json(data))
        return
    OUT.print(report_view(PruneReport.from_json(data)))


def solvers() -> None:
    """List the solvers: whether they can run here, which version, and what each gives up to which size."""
    OUT.print(solvers_table(available_solvers()))


def read_masks(path: Path) -> Masks:
    """Masks from a file of their own, or from the record of a solve that holds them.

    Raises:
        PlanError: the file holds neither.
    """
    data = read_json(path, "a file of masks that `qcqp-prune solve` wrote")
    inner = data.get("masks", data)
    if not isinstance(inner, dict) or "keep" not in inner:
        raise PlanError(f"{path} holds no masks: give the file that `qcqp-prune solve` wrote")
    return Masks.from_json(inner)


def _show_solve(result: SolveReport) -> None:
    OUT.print(usage_table(result.usage.items()))
    for line in solve_lines(result):
        OUT.print(line)
