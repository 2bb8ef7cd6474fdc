"""Random networks of all families, up to twelve blocks deep: identities 2 and 3 under random masks.

    python -m benchmarks.random_graphs [--examples 10000] [--seed 0] [--jobs 1] [--minutes 60] [--again]

Hypothesis draws networks, options and masks as the tests do (``tests.recipes``, ``tests.checks``), in batches of 50,
each with a seed of its own, four batches a process. After each process everything so far is written to
benchmarks/results/random_graphs.json; a run goes on from there, and begins no process after the minutes given. A
violation is recorded with what reproduces it; its batch is drawn anew once the library is of another commit.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import UnsatisfiedAssumption

from benchmarks.recording import in_a_process, library_commit, record, recorded
from tests.checks import MASKS, Example, check, examples
from tests.recipes import recipes

BATCH, CHUNK = 50, 4
"""Examples of a batch, and batches of a process."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    rows = [] if options.again else [r for r in recorded("random_graphs") if r["seed"] == options.seed]
    rows = [r for r in rows if not r["violations"] or r["commit"] == library_commit()]
    there = {row["batch"] for row in rows}
    wanted = [n for n in range(-(-options.examples // BATCH)) if n not in there]
    chunks = [wanted[k : k + CHUNK] for k in range(0, len(wanted), CHUNK)]
    ends, lock = time.monotonic() + 60 * options.minutes, Lock()

    def run(numbers: list[int]) -> None:
        if time.monotonic() > ends:
            return
        found = in_a_process("benchmarks.random_graphs:batches", options.seed, *numbers)["rows"]
        with lock:
            rows.extend(found)
            record("random_graphs", sorted(rows, key=lambda r: int(r["batch"])), packages=("hypothesis",))
            examples = sum(r["examples"] for r in rows)
            print(f"{examples} examples, {sum(len(r['violations']) for r in rows)} violations", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, chunks))


def batches(seed: int, *numbers: int) -> dict[str, Any]:
    """Some batches, one after another."""
    # Exports allocate so many small objects that collecting them all the time takes a tenth.
    gc.freeze()
    gc.set_threshold(200_000, 50, 50)
    return {"rows": [batch(seed, number) for number in numbers]}


def batch(seed: int, number: int) -> dict[str, Any]:
    """One batch: how many examples, how often each family and option occurred, and what was violated."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message="LSTM with projections")
    counted: Counter[str] = Counter()
    violations: list[dict[str, str]] = []
    started = time.perf_counter()

    @seeded(1_000_003 * seed + number)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(example=examples(recipes()))
    def draw(example: Example) -> None:
        try:
            checked = check(example)
        except UnsatisfiedAssumption:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a violation
            violations.append(
                {"example": repr(example), "error": f"{type(error).__name__}: {str(error)[:300]}"}
            )
            checked = []
        counted.update(["examples", *set(example.recipe.blocks), f"start: {example.recipe.start}"])
        counted.update(
            [
                f"depth: {len(example.recipe.blocks)}",
                f"sharing: {example.sharing}",
                f"units: {'/'.join(example.units)}",
            ]
        )
        counted.update({f"realised as {one.realisation}": 1 for one in checked})

    draw()
    total = counted.pop("examples", 0)
    return {
        "seed": seed,
        "batch": number,
        "commit": library_commit(),
        "examples": total,
        "masks": MASKS * total,
        "seconds": round(time.perf_counter() - started, 1),
        "occurrences": dict(sorted(counted.items())),
        "violations": violations,
    }


if __name__ == "__main__":
    main()
