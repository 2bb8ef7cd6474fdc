"""Configuration files: what is read, and what is refused with a hint."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from qcqp_prune.cli.config import TraceSection, read_config
from qcqp_prune.errors import ConfigError, InvalidBudgetError, InvalidOptionError
from qcqp_prune.graph.trace import trace
from qcqp_prune.program.rounds import Rounds
from qcqp_prune.train import Control, PSPConfig, SPRConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

GOOD = """
[model]
source = "net.py:Net"
kwargs = { classes = 4 }
[input]
shape = [1, 3, 8, 8]
[budgets]
macs = "50%"
params = 200
memory = 0.5
[trace]
round_to = { "a*" = 4 }
min_keep = 0.25
columns = ["a*"]
blocks = true
uniform = ["blocks.*"]
units = { "*" = ["heads"], "a*" = ["widths"] }
[data]
name = "digits"
[solver]
time_limit = 7
[finetune]
epochs = 3
lr = 1
milestones = [0.5]
grad_clip = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_values_and_defaults(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, GOOD))
    assert config.model.kwargs == {"classes": 4}
    assert config.input.shape == (1, 3, 8, 8)
    assert config.budgets == {"macs": "50%", "params": 200, "memory": 0.5}
    assert config.trace.round_to == {"a*": 4}
    assert config.trace.min_keep == 0.25
    assert config.trace.columns == ("a*",)
    assert config.trace.blocks is True
    assert config.trace.uniform == ("blocks.*",)
    assert config.trace.units == {"*": ["heads"], "a*": ["widths"]}
    assert config.solver.time_limit == 7.0
    assert config.solver.name == "auto"
    assert (config.finetune.epochs, config.finetune.recipe.lr) == (3, 1.0)
    assert config.finetune.recipe.milestones == (0.5,)
    assert config.finetune.recipe.grad_clip == 2
    assert config.pretrain.epochs == 0
    assert config.path("x/y") == tmp_path / "x" / "y"


def test_rounds_and_what_the_recipe_says(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, GOOD + "[rounds]\ncount = 4\nepochs = 2\n"))
    assert config.rounds == Rounds(4, 2)
    assert read_config(write(tmp_path, GOOD)).rounds is None
    assert config.finetune.given == ("lr", "milestones", "grad_clip")
    with pytest.raises(ConfigError, match=r"\[rounds\] has no epochs"):
        read_config(write(tmp_path, GOOD + "[rounds]\ncount = 4\n"))
    both = '[rounds]\ncount = 4\nepochs = 2\n[training]\nmethod = "spr"\nepochs = 1\n'
    with pytest.raises(ConfigError, match=r"\[rounds\] and \[training\] at once"):
        read_config(write(tmp_path, GOOD + both))
    bare = GOOD.replace('name = "digits"', 'name = "none"').replace("epochs = 3", "epochs = 0")
    with pytest.raises(ConfigError, match=r"\[rounds\] epochs need data"):
        read_config(write(tmp_path, bare + "[rounds]\ncount = 4\nepochs = 2\n"))


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE_DATA_IS", "/data")
    text = GOOD.replace('name = "digits"', 'name = "cifar10"\nroot = "${WHERE_DATA_IS}/cifar"')
    assert read_config(write(tmp_path, text)).data.root == "/data/cifar"
    monkeypatch.delenv("WHERE_DATA_IS")
    with pytest.raises(ConfigError, match=r"data\.root needs the environment variable WHERE_DATA_IS"):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 3", "epoch = 3", r"unknown key 'epoch' in \[finetune\]: did you mean 'epochs'"),
        ("time_limit", "timelimit", "did you mean 'time_limit'"),
        ("[solver]", "[solvers]", r"table \[solvers\].*did you mean 'solver'"),
        ("min_keep", "min_kep", "did you mean 'min_keep'"),
        ("epochs = 3", 'epochs = "three"', 'epochs is "three": give a whole number'),
        ("epochs = 3", "epochs = true", "epochs is True: give a whole number"),
        ("shape = [1, 3, 8, 8]", 'shape = "1,3"', "give a list, each entry a whole number"),
        ('name = "digits"', 'name = "imagenet"', 'give "digits" or "cifar10"'),
        ('name = "digits"', 'name = "none"', "need data"),
        ('source = "net.py:Net"\n', "", r"\[model\] has no source"),
        ("[input]\nshape = [1, 3, 8, 8]\n", "", r"no table \[input\]"),
        ('macs = "50%"\nparams = 200\nmemory = 0.5\n', "", r"\[budgets\] is empty"),
        ("[model]", "[model", "not valid TOML"),
    ],
)
def test_refusals(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, GOOD.replace(old, new)))


def test_values_that_the_library_refuses_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidBudgetError, match="unknown resource 'flops'"):
        read_config(write(tmp_path, GOOD.replace("params = 200", "flops = 200")))
    with pytest.raises(InvalidOptionError, match="lr is -1"):
        read_config(write(tmp_path, GOOD.replace("lr = 1", "lr = -1")))


def test_a_training_under_a_regulariser(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, GOOD)).training.method == "none"
    assert read_config(write(tmp_path, GOOD)).importance is None
    text = (
        GOOD
        + '[training]\nmethod = "spr"\nepochs = 5\nalpha = 0.4\nrate = 1\nlr = 0.2\nstructure = "units"\n'
    )
    spr = read_config(write(tmp_path, text)).training
    assert spr.regulariser == SPRConfig(alpha=0.4, structure="units")
    assert (spr.epochs, spr.control, spr.steps, spr.recipe.lr) == (5, True, Control(rate=1.0), 0.2)
    rule = '[training]\nmethod = "psp"\nepochs = 2\ncontrol = false\nl1 = 0.01\nseed = 4\n'
    config = read_config(
        write(tmp_path, GOOD.replace('[budgets]\nmacs = "50%"\nparams = 200\nmemory = 0.5\n', rule))
    )
    assert config.budgets is None
    assert config.training.regulariser == PSPConfig("channel", spread=None, l1=0.01, seed=4)
    assert config.training.recipe.seed == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('method = "spr"\nepochs = 1\nstrength = 0.1', "strength is found by the control"),
        ('method = "psp"\nepochs = 1\nl1 = 0.1', "l1 is found by the control"),
        (
            'method = "spr"\nepochs = 1\nthreshold = 0.1',
            "unknown key 'threshold' in .training. with method spr",
        ),
        ('method = "psp"\nepochs = 1\nvariant = "exact"', "unknown key 'variant'"),
        ('method = "spr"\ncontrol = false\nepochs = 1\nrate = 0.1', "unknown key 'rate'"),
        ("epochs = 1", "add method"),
        ('method = "sprr"', 'give "spr" or "psp" or "none"'),
        ('method = "spr"\nepochs = 1\nlearning_rate = 1', "unknown key 'learning_rate'"),
    ],
)
def test_refusals_of_trainings(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, f"{GOOD}[training]\n{table}\n"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.toml")))
def test_the_examples_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCQP_PRUNE_PRETRAINED", "/weights")
    monkeypatch.setenv("QCQP_PRUNE_DATA", "/data")
    assert read_config(EXAMPLES / name).budgets["macs"] == "50%"


def test_the_names_under_trace_are_those_of_the_library() -> None:
    keywords = set(inspect.signature(trace).parameters) - {"model", "example_inputs", "progress", "handlers"}
    assert {f.name for f in fields(TraceSection)} == keywords
