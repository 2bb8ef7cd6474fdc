"""What the field does instead of solving: rankings by l1 norm, knapsacks with frozen costs, alternating blocks.

Each takes a program and returns a 0/1 point; none proves anything. They are written plainly, from the papers, and share
no code with the library's own search. All expect allowed counts without holes.

References:
    Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), supplementary B: alternating blocks;
    Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017): uniform and greedy l1;
    Shen et al., "Structural pruning via latency-saliency knapsack" (NeurIPS 2022): HALP.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize as opt
import scipy.sparse as sp

from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination

HALP_STEPS, HALP_REPAIRS = 10, 10
BLOCK_ROUNDS, KNAPSACK_SECONDS = 50, 5.0


@dataclass(eq=False)
class AsSolver:
    """A heuristic as what ``solve`` takes, which checks its answer like any other."""

    name: str
    heuristic: Callable[[Program, float], np.ndarray]
    classes: tuple[ProblemClass, ...] = (ProblemClass(2, 2),)

    def availability(self) -> Availability:
        return Availability(True)

    def outlook(self, program: Program) -> Outlook | None:
        return None

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        x = self.heuristic(program, options.time_limit or math.inf)
        return RawSolution(Termination(Reason.SEARCH_ENDED), x=x)


def l1_scores(program: Program) -> np.ndarray:
    """The normalised l1 norm of all weights that a unit reads or is read by, ``(n,)``."""
    return program.gradient(np.ones(program.size))


def uniform_l1(program: Program, seconds: float) -> np.ndarray:
    """The largest common share of every group that meets the budgets; in each group the largest norms."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if program.counts_feasible(_shares(program, middle)) else (low, middle)
    return _top(program, l1_scores(program), _shares(program, low))


def greedy_l1(program: Program, seconds: float) -> np.ndarray:
    """One unit after another goes, the smallest norm of the whole network first, until the budgets are met."""
    scores, x = l1_scores(program), np.ones(program.size, np.bool_)
    counts = program.counts(x)
    for unit in np.argsort(scores, kind="stable").tolist():
        if program.counts_feasible(counts):
            break
        g = int(program.group_of[unit])
        if counts[g] - 1 in program.groups[g].counts:
            x[unit] = False
            counts[g] -= 1
    return x


def uniform_filled(program: Program, seconds: float) -> np.ndarray:
    """As ``uniform_l1``, and where rounding the share down left some of a budget, one more unit of a group."""
    scores, x = l1_scores(program), uniform_l1(program, seconds)
    widths = np.asarray([g.width for g in program.groups])
    behind = np.argsort(program.counts(x) / widths, kind="stable").tolist()
    out = [np.flatnonzero(~x & (program.group_of == g)) for g in behind]
    return _filled(program, x, [int(units[scores[units].argmax()]) for units in out if len(units)])


def greedy_filled(program: Program, seconds: float) -> np.ndarray:
    """As ``greedy_l1``, and what the last unit gave back beyond a budget is used, the largest norms first."""
    scores, x = l1_scores(program), greedy_l1(program, seconds)
    return _filled(program, x, [k for k in np.argsort(-scores, kind="stable").tolist() if not x[k]])


def alternating_blocks(program: Program, seconds: float) -> np.ndarray:
    """From the uniform point, all groups of one block at once, exactly, the others fixed; until nothing changes.

    Groups of a block are coupled neither in the objective nor in a budget, so a block is a linear knapsack.
    """
    started = time.perf_counter()
    x = uniform_l1(program, seconds)
    best, blocks = program.objective(x), _blocks(program)
    for _ in range(BLOCK_ROUNDS):
        before = best
        for block in blocks:
            if time.perf_counter() - started > seconds:
                return x
            values, inside = program.gradient(x.astype(np.float64)), np.isin(program.group_of, block)
            costs, slack = _marginal_costs(program, program.counts(x))
            room = slack + costs[:, program.group_of[inside]] @ x[inside]
            found = _knapsack(program, values, costs, room, inside, x)
            if found is not None and program.is_feasible(found) and program.objective(found) > best:
                x, best = found, program.objective(found)
        if best <= before:
            break
    return x


def halp(program: Program, seconds: float) -> np.ndarray:
    """A knapsack over the kept units with values and costs frozen at the current mask; the budget falls step by step.

    Because costs change with the mask, a last step may miss the budget: it is repeated with a smaller one.
    """
    started = time.perf_counter()
    x = np.ones(program.size, np.bool_)
    limits = np.asarray([c.limit for c in program.constraints], np.float64)
    dense = np.asarray([c.form.evaluate(program.counts(x)) for c in program.constraints], np.float64)
    targets = [dense + (limits - dense) * k / HALP_STEPS for k in range(1, HALP_STEPS + 1)]
    targets += [limits * 0.995**k for k in range(HALP_REPAIRS)]
    for k, target in enumerate(targets):
        if k >= HALP_STEPS and program.is_feasible(x):
            break
        if time.perf_counter() - started > seconds:
            break
        counts = program.counts(x)
        costs, _ = _marginal_costs(program, counts)
        use = np.asarray([c.form.evaluate(counts) for c in program.constraints])
        room = target - use + costs @ counts
        values = np.where(x, program.gradient(x.astype(np.float64)), -np.inf)
        found = _knapsack(program, values, costs, room, x, x)
        x = x if found is None else found
    return x


def _shares(program: Program, share: float) -> np.ndarray:
    return np.asarray([max(int(share * g.width), g.counts[0]) for g in program.groups], np.int64)


def _top(program: Program, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    x = np.zeros(program.size, np.bool_)
    for group, n in zip(program.groups, counts.tolist(), strict=True):
        x[group.start + np.argsort(-scores[group.span], kind="stable")[:n]] = True
    return x


def _filled(program: Program, x: np.ndarray, units: list[int]) -> np.ndarray:
    """The point with those of some units put back, in their order, that the budgets still hold."""
    x, counts = x.copy(), program.counts(x)
    for unit in units:
        g = int(program.group_of[unit])
        counts[g] += 1
        x[unit] = counts[g] in program.groups[g].counts and program.counts_feasible(counts)
        counts[g] -= not x[unit]
    return x


def _marginal_costs(program: Program, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What one more unit of each group costs at these counts, ``(budgets, groups)``, and what is left."""
    costs, slack = [], []
    for constraint in program.constraints:
        use = constraint.form.evaluate(counts)
        slack.append(constraint.limit - use)
        steps = []
        for g in range(len(counts)):
            more = counts.copy()
            more[g] += 1 if counts[g] < program.groups[g].width else -1
            steps.append(abs(constraint.form.evaluate(more) - use))
        costs.append(steps)
    return np.asarray(costs, np.float64), np.asarray(slack, np.float64)


def _knapsack(
    program: Program,
    values: np.ndarray,
    costs: np.ndarray,
    room: np.ndarray,
    inside: np.ndarray,
    x: np.ndarray,
) -> np.ndarray | None:
    """The best choice among the units ``inside`` with linear values and costs; other units stay as they are."""
    units = np.flatnonzero(inside)
    groups = program.group_of[units]
    present = np.unique(groups)
    member = sp.csr_array((np.ones(len(units)), (np.searchsorted(present, groups), np.arange(len(units)))))
    low = [program.groups[g].counts[0] for g in present]
    high = [program.groups[g].counts[-1] for g in present]
    scale = np.maximum(np.abs(room), 1.0)
    found = opt.milp(
        -values[units],
        integrality=np.ones(len(units)),
        bounds=opt.Bounds(0, 1),
        constraints=[
            opt.LinearConstraint(costs[:, groups] / scale[:, None], ub=room / scale),
            opt.LinearConstraint(member, low, high),
        ],
        options={"time_limit": KNAPSACK_SECONDS, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return None
    chosen = x.copy()
    chosen[units] = np.rint(found.x) == 1.0
    return chosen


def _blocks(program: Program) -> list[list[int]]:
    """Groups coloured greedily, so that no two of one colour are coupled."""
    coupled = {(p.first, p.second) for p in program.pairs}
    for constraint in program.constraints:
        coupled |= set(zip(constraint.form.rows.tolist(), constraint.form.cols.tolist(), strict=True))
    neighbours: dict[int, set[int]] = {g: set() for g in range(len(program.groups))}
    for g, h in coupled:
        neighbours[g].add(h)
        neighbours[h].add(g)
    blocks: list[list[int]] = []
    for g in sorted(neighbours, key=lambda g: -len(neighbours[g])):
        home = next((b for b in blocks if not neighbours[g] & set(b)), None)
        if home is None:
            blocks.append([g])
        else:
            home.append(g)
    return blocks
