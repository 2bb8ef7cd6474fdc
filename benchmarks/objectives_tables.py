"""Tables of ``benchmarks.objectives`` for docs/results.md, and the measured part of docs/concepts.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scipy.stats import spearmanr

from benchmarks.importances import DEFAULT, OBJECTIVES, PRINTED
from benchmarks.objectives import BUDGETS, FLOORS, KINDS, ORDERS, PREDICTING, RANDOM_UNITS, REPAIRS

Row = dict[str, Any]
MEASURED = ("recalibrated", "reconstructed")
ACCURACIES = ("cut", *REPAIRS)


def table(rows: list[Row]) -> str:
    """Everything as Markdown."""
    lines: list[str] = []
    chosen = _part(rows, "selections")
    if chosen:
        lines += _selections(chosen)
    predicted = _part(rows, "predictions")
    if predicted:
        lines += [*([""] if lines else []), *_predictions(predicted)]
    return "\n".join(lines)


def block(rows: list[Row]) -> str:
    """The printed objective and the default one at the same budgets; empty until both are measured at all of them."""
    found = {(row["objective"], row["budget"]): row for row in _part(rows, "selections")}
    both = [(name, budget) for budget in BUDGETS for name in (PRINTED, DEFAULT)]
    if any(key not in found for key in both):
        return ""
    called = {PRINTED: "printed", DEFAULT: f"`{DEFAULT}`"}
    lines = [
        f"Measured on the pretrained ResNet-20 (dense {_dense(found[both[0]])} % of the test images right), nothing "
        "finetuned; values beside the dense network's:",
        "",
        "| MACs at most | objective | its own value kept | gap to the best | printed value kept | output error, as "
        "`Calibrated` predicts | accuracy, %: cut | batch norms recalibrated | reconstructed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, budget in both:
        row = found[name, budget]
        accuracy = (f"{100 * row['accuracy'][a]:.2f}" for a in ("cut", *MEASURED))
        value = f"{row['value']:.4g} of {row['dense_value']:.4g} ({_own(row)})"
        cells = [value, _gap(row), f"{100 * row['printed_share']:.1f} %", f"{row['predicted_error']:.3f}"]
        lines.append(f"| {budget} | {called[name]} | {' | '.join((*cells, *accuracy))} |")
    kept = [found[key]["kept"] for key in both]
    heads = " | ".join(f"{called[name]}, {budget}" for name, budget in both)
    lines += ["", f"| units kept in the group | of | {heads} |", "|---|---|" + "---|" * len(both)]
    for group, (_, width) in kept[0].items():
        lines.append(f"| `{group}` | {width} | {' | '.join(str(k[group][0]) for k in kept)} |")
    return "\n" + "\n".join(lines) + "\n\n"


def correlations(rows: list[Row]) -> dict[str, tuple[int, dict[tuple[str, str], float]]]:
    """Spearman's rank correlation of predicted and measured loss.

    Returns:
        For each set of masks how many they are, and by predicting objective and repair the correlation; sets of fewer
        than three masks are left out.
    """
    rows = _part(rows, "predictions")
    sets: dict[str, set[str]] = {"random units": {RANDOM_UNITS}}
    sets |= {f"the best by {name}": {name} for name in ORDERS}
    sets |= {f"random units and the best by {name}": {RANDOM_UNITS, name} for name in ORDERS}
    sets["all"] = set(KINDS)
    found: dict[str, tuple[int, dict[tuple[str, str], float]]] = {}
    for title, orders in sets.items():
        mine = [row for row in rows if row["order"] in orders]
        if len(mine) >= 3 and {row["order"] for row in mine} == orders:
            found[title] = (
                len(mine),
                {
                    (name, repaired): float(
                        spearmanr(
                            [row["predicted"][name] for row in mine], [row["loss"][repaired] for row in mine]
                        ).statistic
                    )
                    for name in PREDICTING
                    for repaired in MEASURED
                },
            )
    return found


def _selections(rows: list[Row]) -> Iterator[str]:
    yield (
        f"The pretrained ResNet-20, dense {_dense(rows[0])} % of the 10,000 test images, nothing finetuned, "
        '`solver="auto"` with 30 s for each selection. Kept is a share of the dense network\'s value, of the objective '
        "itself and of the printed one (`Magnitude()`); predicted is the error of the outputs that `Calibrated` "
        "expects, as a share of their variance. Accuracy is in percent: cut, with batch norms recalibrated, with means "
        "corrected, and reconstructed by least squares, each from the cut network and on 2,500 training images. The "
        "best of a column in bold."
    )
    order = [PRINTED, *FLOORS, *OBJECTIVES]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        mine = sorted((r for r in rows if r["budget"] == budget), key=lambda r: order.index(r["objective"]))
        best = {a: max(round(100 * row["accuracy"][a], 2) for row in mine) for a in ACCURACIES}
        groups = mine[0]["kept"]
        yield ""
        yield (
            f"| {budget} MACs | used | own value kept | gap | printed value kept | predicted | cut | recalibrated | "
            "means corrected | reconstructed |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for row in mine:
            accuracy = []
            for a in ACCURACIES:
                text = f"{100 * row['accuracy'][a]:.2f}"
                accuracy.append(f"**{text}**" if float(text) == best[a] else text)
            share = f"{100 * row['macs']['used'] / row['macs']['dense']:.2f} %"
            cells = [share, _own(row), _gap(row), f"{100 * row['printed_share']:.1f} %"]
            cells += [f"{row['predicted_error']:.3f}", *accuracy]
            yield f"| {row['objective']} | {' | '.join(cells)} |"
        yield ""
        yield f"| units kept, {budget} | {' | '.join(f'`{g}`' for g in groups)} |"
        yield "|---|" + "---|" * len(groups)
        yield f"| dense | {' | '.join(str(width) for _, width in groups.values())} |"
        for row in mine:
            yield f"| {row['objective']} | {' | '.join(str(row['kept'][g][0]) for g in groups)} |"


def _predictions(rows: list[Row]) -> Iterator[str]:
    yield (
        "Spearman's rank correlation of the predicted and the measured loss over masks that keep a random number, 30 "
        "to 100 %, of the units of every group: random ones, or those that an objective puts first. Predicted by "
        "`Calibrated`, by it where it measures cross-entropy in place of the outputs, and by the printed objective "
        "(what it loses). Measured on 1,000 training images that were not calibrated on, after the cut and "
        "recalibration of batch norms, or after the cut and reconstruction."
    )
    yield ""
    heads = " | ".join(f"{name}, {repaired}" for name in PREDICTING for repaired in MEASURED)
    yield f"| masks | number | {heads} |"
    yield "|---|---|" + "---|" * (len(PREDICTING) * len(MEASURED))
    for title, (number, found) in correlations(rows).items():
        yield f"| {title} | {number} | {' | '.join(f'{value:.3f}' for value in found.values())} |"


def _part(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["part"] == name]


def _dense(row: Row) -> str:
    return f"{100 * row['accuracy']['dense']:.2f}"


def _own(row: Row) -> str:
    return f"{100 * row['value'] / row['dense_value']:.1f} %"


def _gap(row: Row) -> str:
    return "none" if row["gap"] is None else f"{100 * row['gap']:.3f} %"
