"""Seconds to trace, group and prune torchvision's models, ours against Torch-Pruning's, in one process.

    python -m benchmarks.rival_tracing [--models GLOB ...] [--limit 30] [--again]

Both prune to about half the multiply-adds and are handed the same network. Ours is ``trace``, a score and a solve by
``block_coordinate`` to exactly half, and a cut copy, not verified: a rewritten graph where a forward pass of the cut
modules fails, which is tried. Theirs is the dependency graph and one step of ``MagnitudePruner`` at a uniform ratio,
with the options that its documentation asks for. *Through* means that a forward pass of the result gives outputs of the
right shape. Seconds are processor seconds of one thread; a side that takes longer than the limit is stopped. Networks
that are recorded are not run again without ``--again``.
"""

from __future__ import annotations

import argparse
import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.recording import library_commit, record, recorded
from benchmarks.zoo import cases
from qcqp_prune.apply.rewrite import rewritings
from qcqp_prune.apply.surgery import copied, cut
from qcqp_prune.graph.export import export

NAME = "rival_tracing"

RATIO = 0.3
"""Of channels that Torch-Pruning removes everywhere; 0.7 squared of the multiply-adds of dense layers remain."""

WORK = 2
"""Sweeps of our search."""

LEAST = 0.25
"""Share of each layer that ours keeps at least, as in the compatibility matrix."""

Sides = dict[str, Callable[[nn.Module, torch.Tensor, dict[str, float]], nn.Module]]


class TooLong(Exception):
    """A side took longer than it may."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--limit", type=float, default=30.0, help="processor seconds of a side")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    _warm_up()
    for case in cases("torchvision", tuple(options.models)):
        others = [row for row in recorded(NAME) if row["model"] != case.name]
        if len(others) < len(recorded(NAME)) and not (options.again or options.dry):
            continue
        torch.manual_seed(0)
        model, x = case.build().eval(), case.inputs()  # what the weights are changes no time
        dense = qp.Macs().measure(model, x)
        row: dict[str, Any] = {
            "model": case.name,
            "input": case.shown,
            "commit": library_commit(),
            "macs": dense,
        }
        for name, side in SIDES.items():
            row[name] = measured(side, model, x, dense, options.limit)
        print(row, flush=True)
        if not options.dry:
            rows = sorted([*others, row], key=lambda r: str(r["model"]))
            record(NAME, rows, packages=("torchvision", "torch-pruning"))


def _warm_up() -> None:
    """What is imported and compiled on first use is nobody's time."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    for side in SIDES.values():
        side(copy.deepcopy(model).eval(), torch.randn(1, 3, 8, 8), {})


def measured(
    side: Callable[..., nn.Module], model: nn.Module, x: torch.Tensor, dense: int, limit: float
) -> dict[str, Any]:
    """One side on a copy of a network: seconds of its parts, and what remains, or why it did not get through."""
    seconds: dict[str, float] = {}
    subject = copy.deepcopy(model)
    with torch.no_grad():
        wanted = _shape(subject(x))
    try:
        with _limited(limit):
            small = side(subject, x, seconds)
        with torch.no_grad():
            found = _shape(small(x))
        if found != wanted:
            raise RuntimeError(f"the outputs have shape {found}, not {wanted}")
        left = qp.Macs().measure(small, x)
        if left >= dense:
            raise RuntimeError("nothing was removed")
    except TooLong:
        return {"through": False, "error": f"took more than {limit:.0f} s"}
    except Exception as error:  # noqa: BLE001 - whatever stops a side is its result
        return {"through": False, "error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    total = round(sum(seconds.values()), 3)
    parts = {name: round(value, 3) for name, value in seconds.items()}
    return {"through": True, "seconds": total, "parts": parts, "macs_left": left / dense}


def ours(model: nn.Module, x: torch.Tensor, seconds: dict[str, float]) -> nn.Module:
    """Trace, solve and cut; ``torch.export``, which the trace begins with, apart from the rest of it."""

    def timed_export(*arguments: Any) -> Any:
        with _timed(seconds, "export"):
            return export(*arguments)

    with _timed(seconds, "group"), patch("qcqp_prune.graph.trace.export", timed_export):
        graph = qp.trace(model, x, min_keep=LEAST)
    seconds["group"] -= seconds["export"]
    with _timed(seconds, "score and solve"):
        problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
        options = qp.SolveOptions(work_limit=WORK, seed=0)
        flat = qp.solve(problem, "block_coordinate", options=options).masks.flat(graph)
    with _timed(seconds, "cut"):
        small = copied(model)
        cut(small, graph, flat)
        try:
            with torch.no_grad():
                small(x)
        except (RuntimeError, ValueError, AssertionError):  # shapes are written into its forward
            return next(rewritings(model, small, graph, flat))
    return small


def torch_pruning(model: nn.Module, x: torch.Tensor, seconds: dict[str, float]) -> nn.Module:
    """Torch-Pruning as its documentation says: heads are ignored, raw parameters are named, heads of attention too."""
    import torch_pruning as tp

    with _timed(seconds, "dependency graph"):
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=RATIO,
            ignored_layers=[m for m in model.modules() if _is_head(m)],
            unwrapped_parameters=_raw(model),
            num_heads={m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)},
        )
    with _timed(seconds, "step"):
        pruner.step()
    return model


SIDES: Sides = {"ours": ours, "torch_pruning": torch_pruning}


def _is_head(module: nn.Module) -> bool:
    classes = 1000
    return (isinstance(module, nn.Linear) and module.out_features == classes) or (
        isinstance(module, nn.Conv2d) and module.out_channels == classes
    )


def _raw(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters that no layer of PyTorch owns, with the dimension of their channels, as its examples give it."""
    dims = {"layer_scale": 0, "class_token": 2, "pos_embedding": 2, "relative_position_bias_table": 1}
    found = ((name.rpartition(".")[2], p) for name, p in model.named_parameters())
    return [(p, dims[name]) for name, p in found if name in dims]


def _shape(output: Any) -> tuple[int, ...]:
    return tuple(output.shape)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[name] = time.process_time() - started


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Stop a block that takes longer, in processor seconds."""

    def stop(signal_number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


if __name__ == "__main__":
    main()
