"""What more budget would be worth at most, in words."""

from __future__ import annotations

from qcqp_prune.solve.report import SolveReport

_LETTERS = ("", "k", "M", "G", "T", "P")


def price_lines(report: SolveReport) -> list[str]:
    """One line for each budget with a price, in a step that suits the size of its limit.

    A price is the slope of the bound: an upper estimate of what more of a resource can bring, not a promise.
    """
    lines = []
    for name, use in report.usage.items():
        if use.limit is None or name not in report.prices:
            continue
        thousands = min((len(str(max(use.limit, 1))) - 1) // 3, len(_LETTERS) - 1)
        worth = report.prices[name] * 1000**thousands
        share = f" ({worth / abs(report.objective):.3%} of the selection's worth)" if report.objective else ""
        lines.append(
            f"price of {name}: 1{_LETTERS[thousands]} more {use.unit} can add {worth:.3g} at most{share}, by the slope "
            "of the bound"
        )
    return lines
