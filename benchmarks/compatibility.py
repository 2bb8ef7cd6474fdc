"""Which networks the library prunes, and what it left alone: each traced, cut to half its multiply-adds, and verified.

    python -m benchmarks.compatibility [--source NAME ...] [--models GLOB ...] [--again | --failed] [--jobs 1]

Every network runs in a process of its own, with a limit of time and of memory. Rows are written as they come, and rows
that are there already are not run again: ``--again`` runs them anew, ``--failed`` those that were not verified.
``--list`` names the cases and runs nothing, ``--dry`` writes nothing. ``python -m benchmarks.tables`` makes
docs/compatibility.md.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from benchmarks.recording import Limits, ProcessFailed, in_a_process, library_commit, record, recorded
from benchmarks.zoo import SOURCES, cases
from benchmarks.zoo.case import Case

NAME = "compatibility"
PACKAGES = ("torchvision", "timm", "transformers")

Key = tuple[str, str]
"""Source and name of a case."""


def main() -> None:
    options = _options()
    globs = tuple(options.models)
    chosen = {(source, c.name): c for source in options.source for c in cases(source, globs)}
    if options.list:
        print("\n".join(f"{source}: {name}" for source, name in chosen))
        return
    there = {_key(row): row for row in recorded(NAME)}
    if options.failed:
        chosen = {key: c for key, c in chosen.items() if there.get(key, {}).get("status") != "verified"}
    elif not options.again and not options.dry:
        chosen = {key: c for key, c in chosen.items() if key not in there}
    limits, lock = Limits(options.seconds, options.memory), Lock()

    def run(item: tuple[Key, Case]) -> None:
        row = _row(*item, limits)
        with lock:
            print(summary(row), flush=True)
            if not options.dry:
                _add(row)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, chosen.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true")
    which.add_argument("--failed", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--memory", type=int, default=14_000, help="megabytes")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def _row(key: Key, case: Case, limits: Limits) -> dict[str, Any]:
    """One row; of a process that died or was stopped it says so."""
    about = {"model": case.name, "source": key[0], "input": case.shown, "note": case.note}
    about["commit"] = library_commit()
    try:
        return about | in_a_process("benchmarks.compatibility_row:measure", *key, limits=limits)
    except ProcessFailed as failed:
        return about | {"status": "failed", "stage": failed.stage, "error": str(failed)}


def _add(row: dict[str, Any]) -> None:
    """Into the file, which is read again: another process may have added rows meanwhile."""
    rows = {_key(r): r for r in recorded(NAME)} | {_key(row): row}
    order = list(SOURCES)
    record(
        NAME, sorted(rows.values(), key=lambda r: (order.index(r["source"]), r["model"])), packages=PACKAGES
    )


def _key(row: dict[str, Any]) -> Key:
    return row["source"], row["model"]


def summary(row: dict[str, Any]) -> str:
    """A row in one line."""
    head = f"{row['source']}: {row['model']}: {row['status']}"
    if "error" in row:
        return f"{head} at {row['stage']}: {row['error']}"
    seconds = ", ".join(f"{name} {value} s" for name, value in row["seconds"].items())
    return (
        f"{head}, {row['units']:,} units, {100 * row['prunable_share']:.0f} % prunable, "
        f"{row['macs']['counted']:,} of {row['macs']['dense']:,} MACs, error {row['max_relative_error']:.0e} "
        f"({row['realisation']}), {seconds}, {row['peak_mb']:,} MB"
    )


if __name__ == "__main__":
    main()
