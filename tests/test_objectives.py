"""The benchmark of objectives draws masks as it says, goes on where it stopped; its tables say what was measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from benchmarks import accuracy_methods, objectives, recording, settings, tables
from benchmarks.accuracy import accuracy_of
from benchmarks.importances import BY_LOSS, DEFAULT, PAPER, PRINTED
from benchmarks.objectives import RANDOM_UNITS, drawn, forgone
from benchmarks.objectives_tables import block, correlations, table
from benchmarks.settings import Setting
from qcqp_prune.data import digits
from qcqp_prune.models import DigitsNet
from qcqp_prune.pipeline import Importance
from qcqp_prune.program.ranks import worth_alone
from qcqp_prune.train import FinetuneConfig


def calibrated(setting: Setting) -> Importance:
    return qp.Calibrated(setting.calibration(), trials=50, ratios=(0.5,))


def by_loss(setting: Setting) -> Importance:
    return qp.Calibrated(setting.calibration(), loss=nn.functional.cross_entropy, trials=50, ratios=(0.5,))


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = DigitsNet()
    qp.finetune(model, digits().train.loader(64, shuffle=True), epochs=2, config=FinetuneConfig(lr=0.05))
    return model


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setting:
    """A small network in place of ResNet-20, few images, two objectives, one budget."""
    monkeypatch.setattr(settings, "CALIBRATION", 200)
    monkeypatch.setattr(settings, "HELD_OUT", 100)
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(accuracy_methods, "SELECTIONS", tmp_path / "selections")
    small = Setting("digits", trained(), torch.zeros(1, 1, 8, 8), digits(), None, FinetuneConfig())
    monkeypatch.setattr(objectives, "SETTINGS", {objectives.NETWORK: lambda: small})
    monkeypatch.setattr(objectives, "OBJECTIVES", {PRINTED: PAPER, DEFAULT: calibrated, BY_LOSS: by_loss})
    monkeypatch.setattr(objectives, "BUDGETS", ("60%",))
    return small


def run(*arguments: str) -> list[dict[str, Any]]:
    objectives.main(["--masks", "1", *arguments])
    return recording.recorded("objectives")


def test_rows_say_what_was_kept_what_it_is_worth_and_what_each_repair_does(setting: Setting) -> None:
    printed, default = run("--parts", "selections", "--objectives", PRINTED, DEFAULT)
    assert (printed["objective"], default["objective"]) == (PRINTED, DEFAULT)
    for row in (printed, default):
        assert row["macs"]["used"] <= row["macs"]["limit"] == setting.limit("60%")
        assert row["predicted_error"] > 0
        assert all(0 < few <= many for few, many in row["kept"].values())
    assert printed["printed_share"] == pytest.approx(printed["value"] / printed["dense_value"])
    assert default["predicted_error"] == pytest.approx(default["dense_value"] - default["value"])
    # The printed objective's selection is the best by the printed value, the default's by the predicted loss.
    assert printed["printed_share"] > default["printed_share"]
    assert printed["predicted_error"] > default["predicted_error"]

    masks, _ = objectives.Solved(calibrated, "auto").select(setting, "60%")
    assert {g: few for g, (few, _) in default["kept"].items()}.items() <= masks.counts().items()
    for method, name in (("means", "bias_corrected"), ("least_squares", "reconstructed")):
        small = qp.shrink(setting.model, setting.graph, masks)
        qp.reconstruct(small, setting.model, setting.graph, masks, setting.calibration(), method=method)
        assert default["accuracy"][name] == pytest.approx(accuracy_of(small, setting))
    small = qp.shrink(setting.model, setting.graph, masks)
    assert default["accuracy"]["cut"] == pytest.approx(accuracy_of(small, setting))


def test_the_printed_objective_is_measured_under_floors_too(setting: Setting) -> None:
    free, floored = run("--parts", "selections", "--objectives", PRINTED, objectives.FLOORED)
    share = objectives.FLOORS[objectives.FLOORED]
    assert all(few >= share * many for few, many in floored["kept"].values())
    assert floored["dense_value"] == free["dense_value"]
    assert floored["value"] <= free["value"]
    assert floored["printed_share"] == pytest.approx(floored["value"] / floored["dense_value"])


def test_predictions_are_checked_on_images_that_were_not_calibrated_on(setting: Setting) -> None:
    rows = run("--parts", "predictions")
    assert [(row["order"], row["mask"]) for row in rows] == [(o, 0) for o in (RANDOM_UNITS, DEFAULT, PRINTED)]
    flat = drawn(setting, DEFAULT, 0)
    masks = qp.Masks.from_flat(setting.graph, flat)
    row = rows[1]
    for name, form in (
        (PRINTED, qp.Magnitude()),
        (DEFAULT, calibrated(setting)),
        (BY_LOSS, by_loss(setting)),
    ):
        worth = form(setting.model, setting.graph)
        assert row["predicted"][name] == pytest.approx(
            worth.evaluate(np.ones_like(flat)) - worth.evaluate(flat)
        )
    small = qp.shrink(setting.model, setting.graph, masks)
    qp.recalibrate_batch_norm(small, setting.calibration())
    seen, unseen = ({x.numpy().tobytes() for b, _ in part for x in b} for part in loaders(setting))
    assert len(seen) == 200
    assert len(unseen) == 100
    assert not seen & unseen
    assert row["loss"]["recalibrated"] == pytest.approx(qp.evaluate(small, setting.held_out()).loss)
    assert row["loss"]["dense"] == pytest.approx(qp.evaluate(setting.model, setting.held_out()).loss)
    assert row["loss"]["reconstructed"] != row["loss"]["recalibrated"]


def loaders(setting: Setting) -> tuple[Any, Any]:
    return setting.calibration(), setting.held_out()


def test_masks_keep_random_numbers_of_random_units_or_of_the_best(setting: Setting) -> None:
    graph, counts = setting.graph, {}
    for order in (RANDOM_UNITS, DEFAULT, PRINTED):
        flats = [drawn(setting, order, k) for k in range(12)]
        assert all(np.array_equal(flat, drawn(setting, order, k)) for k, flat in enumerate(flats))
        counts[order] = np.asarray([list(qp.Masks.from_flat(graph, f).counts().values()) for f in flats])
    widths = np.asarray([g.width for g in graph.groups])
    free = np.asarray([not g.stays for g in graph.groups])
    for found in counts.values():
        shares = found / widths
        assert (shares[:, ~free] == 1).all()
        assert shares[:, free].min() >= objectives.LEAST
        assert shares[:, free].min() < 0.45
        assert shares[:, free].max() == 1
    assert np.array_equal(counts[DEFAULT], counts[PRINTED])
    assert not np.array_equal(counts[DEFAULT], counts[RANDOM_UNITS])

    worth = worth_alone(qp.Magnitude()(setting.model, graph))
    best, random = (drawn(setting, order, 3) for order in (PRINTED, RANDOM_UNITS))

    def is_best(flat: Any, g: int) -> bool:
        kept, gone = (worth[graph.units(g)][part] for part in (flat[graph.units(g)], ~flat[graph.units(g)]))
        return kept.min() >= gone.max(initial=-np.inf)

    assert all(is_best(best, g) for g in np.flatnonzero(free))
    assert not all(is_best(random, g) for g in np.flatnonzero(free))
    assert forgone(setting, PRINTED, np.ones_like(best)) == 0


def test_it_goes_on_where_it_stopped(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def noted(setting: Setting, *what: Any) -> dict[str, Any]:
        measured.append(what)
        return {"x": len(measured)}

    monkeypatch.setattr(objectives, "selection", noted)
    monkeypatch.setattr(objectives, "prediction", noted)
    assert run("--dry", "--objectives", PRINTED) == []
    assert len(measured) == 4
    rows = run("--parts", "selections", "--objectives", PRINTED)
    assert measured[4:] == [(PRINTED, "60%")]
    again = run("--objectives", PRINTED)
    assert measured[5:] == [(RANDOM_UNITS, 0), (DEFAULT, 0), (PRINTED, 0)]
    assert again[0] == rows[0]
    assert run("--objectives", PRINTED) == again
    last = run("--parts", "selections", "--objectives", PRINTED, "--again")
    assert measured[8:] == [(PRINTED, "60%")]
    assert len(last) == len(again)


def chosen(name: str, budget: str, value: float, accuracy: float, **more: Any) -> dict[str, Any]:
    row = {
        "part": "selections",
        "objective": name,
        "budget": budget,
        "value": value,
        "dense_value": 8.0,
        "gap": 0.0012,
        "printed_share": value / 10,
        "predicted_error": 0.5,
        "macs": {"used": 49, "limit": 50, "dense": 100},
        "kept": {"stem": [1, 4], "block": [7, 8]},
        "accuracy": {
            "dense": 0.95,
            "cut": 0.2,
            "recalibrated": accuracy - 0.1,
            "bias_corrected": accuracy - 0.05,
            "reconstructed": accuracy,
        },
    }
    return row | more


ROWS = [
    chosen(PRINTED, "75%", 7.0, 0.8),
    chosen(DEFAULT, "75%", 6.0, 0.9),
    chosen(PRINTED, "50%", 5.0, 0.5, gap=None),
    chosen(DEFAULT, "50%", 4.0, 0.7, kept={"stem": [3, 4], "block": [2, 8]}),
]


def test_the_measured_part_of_the_concepts_sets_both_side_by_side() -> None:
    text = block(ROWS)
    assert "dense 95.00 %" in text
    assert "| 75% | printed | 7 of 8 (87.5 %) | 0.120 % | 70.0 % | 0.500 | 20.00 | 70.00 | 80.00 |" in text
    assert (
        "| 50% | `Calibrated` | 4 of 8 (50.0 %) | 0.120 % | 40.0 % | 0.500 | 20.00 | 60.00 | 70.00 |" in text
    )
    assert "| 50% | printed | 5 of 8 (62.5 %) | none |" in text
    assert "| `block` | 8 | 7 | 7 | 7 | 2 |" in text
    assert block(ROWS[:3]) == ""
    assert block([]) == ""


def test_the_block_replaces_what_stood_between_its_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "concepts.md"
    page.write_text("before\n\n<!-- measured: objectives -->\nold\n<!-- end -->\n\nafter\n")
    monkeypatch.setattr(tables, "CONCEPTS", page)
    monkeypatch.setattr(tables, "recorded", lambda name: ROWS)
    text = tables.concepts()
    assert text == f"before\n\n<!-- measured: objectives -->\n{block(ROWS)}<!-- end -->\n\nafter\n"
    page.write_text(text)
    assert tables.concepts() == text
    monkeypatch.setattr(tables, "recorded", lambda name: [])
    assert tables.concepts() == "before\n\n<!-- measured: objectives -->\n<!-- end -->\n\nafter\n"


def test_the_marks_are_in_the_concepts_once() -> None:
    assert len(tables.MEASURED.findall(tables.CONCEPTS.read_text())) == 1


def test_the_table_has_every_objective_and_marks_the_best() -> None:
    text = table(ROWS)
    assert (
        "| Magnitude paper | 49.00 % | 87.5 % | 0.120 % | 70.0 % | 0.500 | **20.00** | 70.00 | 75.00 | 80.00 |"
        in text
    )
    assert "| **20.00** | **80.00** | **85.00** | **90.00** |" in text
    assert "| dense | 4 | 8 |" in text
    assert "| Calibrated | 3 | 2 |" in text
    assert "Spearman" not in text


def masked(
    order: str, number: int, predicted: tuple[float, float], loss: tuple[float, float]
) -> dict[str, Any]:
    return {
        "part": "predictions",
        "order": order,
        "mask": number,
        "predicted": {**dict(zip((DEFAULT, PRINTED), predicted, strict=True)), BY_LOSS: -predicted[0]},
        "loss": dict(zip(("dense", "recalibrated", "reconstructed"), (0.1, *loss), strict=True)),
    }


def test_rank_correlations_by_hand() -> None:
    rows = [
        masked(RANDOM_UNITS, 0, (1.0, 9.0), (1.0, 10.0)),
        masked(RANDOM_UNITS, 1, (2.0, 8.0), (3.0, 20.0)),
        masked(RANDOM_UNITS, 2, (3.0, 7.0), (2.0, 400.0)),
        masked(DEFAULT, 0, (0.5, 9.5), (0.5, 5.0)),
    ]
    found = correlations([*ROWS, *rows])
    assert set(found) == {"random units", f"random units and the best by {DEFAULT}"}
    number, values = found["random units"]
    assert number == 3
    # Ranks 1 2 3 against 1 3 2: 1 - 6 (0 + 1 + 1) / (3 (9 - 1)).
    assert values[DEFAULT, "recalibrated"] == pytest.approx(0.5)
    assert values[DEFAULT, "reconstructed"] == pytest.approx(1.0)
    assert values[PRINTED, "reconstructed"] == pytest.approx(-1.0)
    assert values[BY_LOSS, "reconstructed"] == pytest.approx(-1.0)
    number, values = found[f"random units and the best by {DEFAULT}"]
    assert number == 4
    assert values[DEFAULT, "recalibrated"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    text = table([*ROWS, *rows])
    assert "| random units | 3 | 0.500 | 1.000 | -0.500 | -1.000 | -0.500 | -1.000 |" in text
