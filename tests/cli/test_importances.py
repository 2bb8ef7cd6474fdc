"""Importances by name: what the files and options say is what the library is asked for."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import qcqp_prune as qp
from qcqp_prune.cli.config import read_config
from qcqp_prune.cli.importances import NEED_DATA, VARIANTS, ImportanceSection, Name, parse_importance
from qcqp_prune.cli.loading import JobData, make_importance
from qcqp_prune.errors import ConfigError
from qcqp_prune.pipeline import describe
from qcqp_prune.program.files import read_traced

HEAD = (
    '[model]\nsource = "net.py:Net"\n[input]\nshape = [1, 1, 8, 8]\n[budgets]\nmacs = "50%"\n[importance]\n'
)
ALL = [(name, variant) for name in get_args(Name) for variant in VARIANTS.get(name, (None,))]
WORDS = {
    "calibrated": "Calibrated",
    "magnitude": "Magnitude",
    "batch_norm_scale": "BatchNormScale",
    "geometric_median": "GeometricMedian",
    "lamp": "Lamp",
    "random": "Random",
    "taylor": "Taylor",
    "fisher": "Fisher",
    "neuron_sensitivity": "NeuronSensitivity",
    "activation": "Activation",
    "output_change": "OutputChange",
}


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_every_name_scores_a_network(name: str, variant: str | None, net: Path, tmp_path: Path) -> None:
    lines = f'name = "{name}"\n' + (f'variant = "{variant}"\n' if variant else "")
    lines += "batches = 1\n" if name in set(NEED_DATA) - {"calibrated"} else ""
    (tmp_path / "job.toml").write_text(HEAD + lines + '[data]\nname = "digits"\n')
    section = read_config(tmp_path / "job.toml").importance
    assert section is not None
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))] * 3
    made = make_importance(section, JobData(batches))
    centred = f"(samples=4, centred={variant == 'centred'}, seed=0)"
    with_numbers = {"random": "(seed=0)", "output_change": centred}
    assert describe(made) == WORDS[name] + with_numbers.get(name, f"({variant})" if variant else "")
    torch.manual_seed(0)
    model = runpy.run_path(str(net))["Net"]()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8))
    form = made(model, graph)
    assert form.evaluate(np.ones(graph.unit_count, np.bool_)) > 0
    if name in NEED_DATA:
        assert len(made.batches) == (3 if name == "calibrated" else 1)  # which takes what it needs
        with pytest.raises(ConfigError, match=f"importance {name} needs data"):
            make_importance(section)
        (tmp_path / "job.toml").write_text(HEAD + lines)
        with pytest.raises(ConfigError, match=rf"\[importance\] {name} need data"):
            read_config(tmp_path / "job.toml")


def test_what_is_made_of_an_importance(run, net: Path, tmp_path: Path) -> None:
    graph = tmp_path / "g.json"
    words = ["--importance", "magnitude:l2", "--normalise", "macs", "--concave", "0.25"]
    result = run("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", graph, *words)
    assert result.code == 0, result.err
    stored = read_traced(graph)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = runpy.run_path(str(net))["Net"]()
    expected = qp.Concave(qp.Normalised(qp.Magnitude("l2"), "macs"), 0.25)(model, stored.graph)
    np.testing.assert_array_equal(stored.objective.unary, expected.unary)
    (tmp_path / "job.toml").write_text(HEAD + 'name = "random"\nseed = 5\nnormalise = "group"\nconcave = 0\n')
    section = read_config(tmp_path / "job.toml").importance
    assert section == ImportanceSection("random", seed=5, normalise="group", concave=0.0)
    assert describe(make_importance(section)) == "Concave(Normalised(Random(seed=5), group), power=0.0)"
    assert parse_importance("random:5") == ImportanceSection("random", seed=5)


@pytest.mark.parametrize(("data", "name"), [("", "magnitude"), ('[data]\nname = "digits"\n', "calibrated")])
def test_a_table_without_a_name_is_of_the_default(data: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(HEAD + "concave = 0.5\n" + data)
    assert read_config(tmp_path / "job.toml").importance == ImportanceSection(name, concave=0.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('name = "tailor"', "importance.name"),
        ('name = "taylor"\nvariant = "l2"', "variants are taylor:weight, taylor:gate"),
        ('name = "fisher"\nvariant = "l2"', "leave the variant out"),
        ('name = "magnitude"\nnormalise = "filter"', "importance.normalise"),
        ('name = "magnitude"\nconcave = 2', "give a power from 0"),
        ('name = "taylor"\nbatches = 0', "give at least 1"),
        ('name = "lamp"\nbatches = 3', "lamp looks at no data: leave it out"),
        ("batches = 3", "calibrated takes samples as it needs them"),
        ('name = "magnitude"\nseed = 5', "magnitude draws nothing"),
        ('variant = "l2"', "calibrated:l2: leave the variant out"),
    ],
)
def test_refusals(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "job.toml").write_text(HEAD + lines + '\n[data]\nname = "digits"\n')
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "job.toml")
