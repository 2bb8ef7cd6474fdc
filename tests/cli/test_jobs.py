"""Whole jobs: the demo, and a job from a configuration file."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

import qcqp_prune as qp
from qcqp_prune.data import digits
from qcqp_prune.models import DigitsNet
from qcqp_prune.report import PruneReport

JOB = """
[model]
source = "net.py:Net"
[input]
shape = [2, 1, 8, 8]
[data]
name = "digits"
batch_size = 100
[pretrain]
epochs = 1
[importance]
name = "taylor"
batches = 2
[budgets]
macs = "50%"
[trace]
ignored_layers = ["b"]
[solver]
name = "highs"
time_limit = 20
[finetune]
epochs = 1
checkpoint = "run.safetensors"
[output]
folder = "out"
"""


def test_demo(run, tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "demo")
    assert result.code == 0, result.err
    report = PruneReport.read(tmp_path / "demo" / "report.json")
    macs = report.budgets[0]
    # stem 64*9*12, block1 2 * 64*9*144, block2 16*9*240 + 16*9*400 + 16*240, linear 200
    assert macs.dense == 6912 + 165888 + 34560 + 57600 + 3840 + 200
    assert macs.limit == macs.dense // 2
    assert 0 <= macs.slack < macs.cheapest_step
    assert report.solve.termination.reason.name == "OPTIMAL"
    assert report.solve.gap <= 1e-4
    assert [c.predicted for c in report.verification.counts] == [
        c.measured for c in report.verification.counts
    ]
    assert {c.resource for c in report.verification.counts} == {"macs", "memory", "params"}
    assert report.accuracy.dense > 0.95
    assert report.accuracy.finetuned >= report.accuracy.dense - 0.01
    for words in (
        "gap",
        "identity 2 checked",
        "identity 3 checked",
        "accuracy",
        str(tmp_path / "demo" / "model"),
    ):
        assert words in result.out
    small = qp.load(tmp_path / "demo" / "model", DigitsNet)
    measured = qp.evaluate(small, digits().test.loader(500))
    assert measured.accuracy == pytest.approx(report.accuracy.finetuned, abs=1e-9)


def test_run(run, net: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    result = run("run", job)
    assert result.code == 0, result.err
    report = PruneReport.read(tmp_path / "out" / "report.json")
    assert report.importance == "Taylor(weight)"
    assert report.solve.solver == "highs"
    assert next(r.why_not for r in report.layers if r.name == "b") == "in ignored_layers (b)"
    assert len(report.training["epochs"]) == 1
    taken = (
        report.accuracy.dense,
        report.accuracy.pruned,
        report.accuracy.repaired,
        report.accuracy.finetuned,
    )
    assert all(0 <= share <= 1 for share in taken)
    assert report.accuracy.samples == len(digits().test)
    small = qp.load(tmp_path / "out" / "model", runpy.run_path(str(net))["Net"])
    kept = next(r.outputs[1] for r in report.layers if r.name == "a")
    assert small.a.out_channels == kept < 6
    assert (tmp_path / "run.safetensors").is_file()
    # Another run is the same job: its results replace the first one's, and the finetuning is not repeated.
    again = run("run", job)
    assert again.code == 0, again.err
    second = PruneReport.read(tmp_path / "out" / "report.json")
    assert second.masks == report.masks
    assert second.training["resumed_at"] == 1


def test_without_data(run, net: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        '[model]\nsource = "net.py:Net"\n[input]\nshape = [1, 1, 8, 8]\n[budgets]\nparams = "70%"\n'
        '[shrink]\nrealisation = "graph"\n'
    )
    result = run("run", job, "--output", tmp_path / "elsewhere")
    assert result.code == 0, result.err
    data = json.loads((tmp_path / "elsewhere" / "report.json").read_text())
    assert data["accuracy"]["dense"] is None
    assert data["verification"]["realisation"] == "graph"
    assert "accuracy" not in result.out
    assert isinstance(
        qp.load(tmp_path / "elsewhere" / "model", runpy.run_path(str(net))["Net"]), torch.fx.GraphModule
    )


TRAINING = """
[model]
source = "qcqp_prune.models:DigitsNet"
[input]
shape = [1, 1, 8, 8]
[data]
name = "digits"
batch_size = 64
[pretrain]
epochs = 4
[budgets]
params = "30%"
[training]
method = "spr"
epochs = 12
alpha = 0.3
rate = 0.2
every = 4
lr = 0.05
schedule = "cosine"
checkpoint = "train.safetensors"
[solver]
name = "highs"
[finetune]
epochs = 2
lr = 0.05
[output]
folder = "out"
"""


def test_a_job_that_trains_under_a_budget(run, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(TRAINING)
    result = run("run", job)
    assert result.code == 0, result.err
    report = PruneReport.read(tmp_path / "out" / "report.json")
    params = report.budgets[0]
    assert params.limit == 3 * params.dense // 10
    assert 0 <= params.slack < params.cheapest_step
    small = qp.load(tmp_path / "out" / "model", DigitsNet)
    assert sum(p.numel() for p in small.parameters()) == params.used
    trace = report.regularised.trace
    assert trace[0].violation > 0.5
    assert trace[-1].violation < 0.02
    assert (tmp_path / "train.safetensors").is_file()
    for words in ("trained under SPR", "accuracy regularised", "relaxed use", "relaxed budgets exceeded by"):
        assert words in result.out


def test_a_training_by_its_rule_needs_no_budget(run, net: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    plain = '[training]\nmethod = "psp"\nepochs = 1\ncontrol = false\n'
    job.write_text(JOB.replace('[budgets]\nmacs = "50%"\n', plain).replace("[importance]", "[importance.x]"))
    assert run("run", job).code == 2
    text = JOB.replace('[budgets]\nmacs = "50%"\n', plain).replace('name = "taylor"\nbatches = 2\n', "")
    job.write_text(text.replace("[importance]\n", ""))
    result = run("run", job)
    assert result.code == 0, result.err
    report = PruneReport.read(tmp_path / "out" / "report.json")
    assert all(line.limit is None for line in report.budgets)
    assert report.importance == "Indicators(PSP(channel))"


def test_a_job_in_rounds(run, net: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    rounds = '[rounds]\ncount = 2\nepochs = 1\nspacing = "linear"\n'
    recipe = "label_smoothing = 0.1\ndistillation = 0.5\ntemperature = 2\nema = 0.9\n[output]"
    job.write_text(JOB.replace("[finetune]", f"{rounds}[finetune]").replace("[output]", recipe))
    result = run("run", job)
    assert result.code == 0, result.err
    report = PruneReport.read(tmp_path / "out" / "report.json")
    macs = report.budgets[0]
    assert [r.limits["macs"] for r in report.rounds] == [
        macs.dense - (macs.dense - macs.limit) // 2,
        macs.limit,
    ]
    assert macs.limit == macs.dense // 2
    assert "a given recipe: sgd, lr 0.01" in report.recipe
    # What the file does not say is what is recommended for the network.
    for words in ("cosine", "label smoothing 0.1", "distillation 0.5 at temperature 2", "decay 0.9"):
        assert words in report.recipe
    for words in ("round 1 of 2", "round 2 of 2", "finetuned by a given recipe", "1 of 2"):
        assert words in result.out
    small = qp.load(tmp_path / "out" / "model", runpy.run_path(str(net))["Net"])
    assert small.a.out_channels == report.masks.counts()["a"]
    assert "leave --certificate or [rounds] out" in run("run", job, "--certificate", tmp_path / "c.json").err


def test_a_job_that_goes_on_keeps_the_certificate_of_its_selection(run, net: Path, tmp_path: Path) -> None:
    job, certificate = tmp_path / "job.toml", tmp_path / "c.json"
    job.write_text(JOB.replace('name = "highs"', 'name = "decomposition"'))
    assert run("run", job, "--certificate", certificate).code == 0
    written = certificate.read_bytes()
    again = run("run", job, "--certificate", certificate)
    assert again.code == 0, again.err
    assert "is the certificate of this selection" in again.out
    assert certificate.read_bytes() == written
    certificate.unlink()
    refused = run("run", job, "--certificate", certificate)
    assert refused.code != 0
    assert "from a file, which has none" in refused.err
    assert "accuracy finetuned" not in refused.out


def test_without_a_recipe_the_recommended_one_is_used(run, net: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB.replace("[output]", 'device = "cpu"\n[output]'))
    assert run("run", job).code == 0
    recipe = PruneReport.read(tmp_path / "out" / "report.json").recipe
    assert recipe.startswith("the recipe recommended for Net: sgd")
    assert "cosine schedule, warm-up of 0.5 epochs" in recipe


def test_a_sweep(run, net: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    table = '[training]\nmethod = "spr"\nepochs = 1\ncontrol = false\n'
    text = JOB.replace('[budgets]\nmacs = "50%"\n', table).replace('checkpoint = "run.safetensors"\n', "")
    pairs = "[sweep]\nstrengths = [0.1, 1]\nalphas = [0.3]\n"
    job.write_text(text + pairs)
    assert "leave [importance] out" in run("sweep", job).err
    text = text.replace('[importance]\nname = "taylor"\nbatches = 2\n', "")
    job.write_text(text)
    assert "a sweep needs" in run("sweep", job).err
    job.write_text(text.replace("[solver]", "[solver]\ngap_limit = 0.01") + pairs)
    result = run("sweep", job)
    assert result.code == 0, result.err
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    rows = stored["rows"]
    assert stored["of"]["options"]["options"]["gap_limit"] == 0.01
    assert [(r["strength"], r["alpha"]) for r in rows] == [(0.1, 0.3), (1.0, 0.3)]
    assert all(f"{r['used']['params']:,}" in result.out for r in rows)
    again = run("sweep", job)
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("[pretrain]\nepochs", "[pretrain]\nepoch"), 2, "did you mean 'epochs'"),
        (('name = "digits"', 'name = "mnist"\nroot = "nowhere"'), 2, "nowhere"),
        (('name = "digits"', 'name = "cifar10"'), 2, "add root"),
        (('name = "highs"', 'name = "hihgs"'), 2, "did you mean 'highs'"),
        (('macs = "50%"', 'macs = "1%"'), 1, "smallest attainable"),
        (('ignored_layers = ["b"]', 'ignored_layers = ["bb"]'), 2, "no layer is called 'bb'"),
        (("[solver]", "round_to = 0\n[solver]"), 2, "round_to=0"),
        (("time_limit = 20", "time_limit = 0"), 2, "time_limit"),
        (("[trace]", '[training]\nmethod = "spr"\n[trace]'), 2, "epochs is 0"),
        (("[trace]", '[training]\nmethod = "psp"\nepochs = 1\nstructure = "shape"\n[trace]'), 2, "channel"),
        (("[finetune]\nepochs = 1", "[finetune]\nepochs = -1"), 2, "epochs is -1"),
        (("[finetune]", "[rounds]\ncount = 0\nepochs = 1\n[finetune]"), 2, "count is 0"),
        (("[2, 1, 8, 8]", "[2, 3, 8, 8]"), 1, "does not run on the example inputs"),
    ],
)
def test_refusals(run, net: Path, tmp_path: Path, change: tuple[str, str], code: int, message: str) -> None:
    assert change[0] in JOB
    job = tmp_path / "job.toml"
    job.write_text(JOB.replace(*change))
    result = run("run", job)
    assert (result.code, result.err.count("error: ")) == (code, 1)
    assert message in result.err
    assert "training" not in result.out  # what can be refused at once is not refused after hours
    assert not (tmp_path / "out").exists()


def test_a_users_folder_is_left_alone_before_any_training(run, net: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.tex").write_text("years of work")
    (job := tmp_path / "job.toml").write_text(JOB)
    result = run("run", job)
    assert result.code == 2
    assert "left alone" in result.err
    assert result.out == ""


def test_weights_of_another_architecture(run, net: Path, tmp_path: Path) -> None:
    torch.save(DigitsNet().state_dict(), tmp_path / "w.pt")
    job = tmp_path / "job.toml"
    job.write_text(JOB.replace('source = "net.py:Net"', 'source = "net.py:Net"\nweights = "w.pt"'))
    result = run("run", job)
    assert result.code == 2
    assert "does not fit Net" in result.err
