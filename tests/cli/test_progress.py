"""A trace that takes long shows how far it is; one that does not, and one that nobody watches, show nothing."""

from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console
from torch import nn

import qcqp_prune as qp
from qcqp_prune.cli.console import TraceBar
from qcqp_prune.graph.export import export
from qcqp_prune.graph.inputs import as_call


def shown(*, terminal: bool, patience: float, wait: float) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    with TraceBar(console, patience=patience).running() as bar:
        bar.show("exporting the network", 0, 0)
        time.sleep(wait)
        bar.show("following its operators", 3, 8)
        time.sleep(wait)
    return file.getvalue()


def test_what_takes_longer_than_patience_is_shown() -> None:
    text = shown(terminal=True, patience=0.05, wait=0.4)
    assert "exporting the network" in text
    assert "following its operators" in text
    assert "3/8" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_before_that_or_into_a_file(terminal: bool) -> None:
    assert shown(terminal=terminal, patience=30.0 if terminal else 0.0, wait=0.1) == ""


def test_a_trace_tells_of_every_operator() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(1, 4)
    told: list[tuple[str, int, int]] = []
    qp.trace(model, x, progress=lambda *step: told.append(step))
    nodes = len(export(model, as_call(x)).graph.nodes)
    assert told[0] == ("exporting the network", 0, 0)
    assert told[1:-1] == [("following its operators", k, nodes) for k in range(nodes)]
    assert told[-1] == ("grouping what lives and dies together", 0, 0)
