"""The strict restriction of a program with links: all units that links join are kept or dropped together.

For free residual sharing that is strict sharing, for shape columns it is whole filters. It has fewer variables, no
links, and each of its points is a point of the program: a good place to start from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune.program.forms import PairTerm
from qcqp_prune.program.gather import gather
from qcqp_prune.program.program import GroupPair, Program, ProgramGroup


@dataclass(frozen=True, eq=False)
class Merged:
    """A program over sets of linked units.

    Attributes:
        program: without links.
        place: its variable for each variable of the original, ``(n,)``.
    """

    program: Program
    place: IntArray

    def expanded(self, x: BoolArray) -> BoolArray:
        """The original program's point."""
        return np.asarray(x[self.place])


def merged(program: Program) -> Merged | None:
    """Merge a program along its links; None where no counts of the sets suit all groups."""
    sets = _sets(program)
    count = int(sets.max()) + 1
    share = np.zeros((count, len(program.groups)), np.int64)
    np.add.at(share, (sets, program.group_of), 1)
    kinds, kind = np.unique(share, axis=0, return_inverse=True)
    kind = kind.ravel()
    order = np.argsort(kind, kind="stable")
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    widths = np.bincount(kind, minlength=len(kinds))
    starts = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
    allowed = [_allowed(program, kinds, widths, k) for k in range(len(kinds))]
    if not all(allowed):
        return None
    ties = _ties(program, kinds)
    groups = tuple(
        ProgramGroup(f"set {k}", int(starts[k]), int(widths[k]), tuple(allowed[k]), ties[k])
        for k in range(len(kinds))
    )
    to_new = place[sets]
    linear, pairs = _objective(program, to_new, groups)
    expressed = {
        g: {k: int(kinds[k, g]) for k in np.flatnonzero(kinds[:, g]).tolist()}
        for g in range(len(program.groups))
    }
    constraints = tuple(
        replace(c, form=c.form.substituted(expressed, len(kinds))) for c in program.constraints
    )
    small = Program(
        groups, linear, pairs, constraints, program.constant, np.arange(count, dtype=np.int64), count
    )
    return Merged(small, to_new)


def _sets(program: Program) -> IntArray:
    """The set of linked units that each variable belongs to."""
    ends = (program.links.wholes, program.links.parts)
    graph = sp.coo_array((np.ones(len(program.links)), ends), shape=(program.size, program.size))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _allowed(program: Program, kinds: IntArray, widths: IntArray, k: int) -> list[int]:
    """Counts of one kind of set that suit every group they lie in; floors are shared out in proportion."""
    width, counts = int(widths[k]), np.arange(int(widths[k]) + 1)
    ok = np.ones(width + 1, np.bool_)
    for g in np.flatnonzero(kinds[k]).tolist():
        group, share = program.groups[g], int(kinds[k, g])
        if share * width == group.width:
            ok &= np.isin(share * counts, group.counts)
            continue
        step = int(np.gcd.reduce(np.diff(group.counts))) if len(group.counts) > 1 else group.width
        floor = int(np.ceil(group.counts[0] * width * share / group.width))
        ok &= ((share * counts) % step == 0) & (share * counts >= floor)
    return [int(n) for n in counts[ok]]


def _ties(program: Program, kinds: IntArray) -> list[int]:
    """Kinds that share a tied group move together; the check of the final point decides."""
    ties = list(range(len(kinds)))
    for tie in {g.tie for g in program.groups}:
        members = [g for g, group in enumerate(program.groups) if group.tie == tie]
        if len(members) > 1:
            inside = np.flatnonzero(kinds[:, members].any(1)).tolist()
            low = min(ties[k] for k in inside)
            ties = [low if t in {ties[k] for k in inside} else t for t in ties]
    return [sorted(set(ties)).index(t) for t in ties]


def _objective(
    program: Program, to_new: IntArray, groups: tuple[ProgramGroup, ...]
) -> tuple[FloatArray, tuple[GroupPair, ...]]:
    ends = [g.start for g in groups] + [groups[-1].start + groups[-1].width]
    linear = np.zeros(ends[-1])
    np.add.at(linear, to_new, program.linear)
    spans = [g.span for g in program.groups]
    terms = (PairTerm(to_new[spans[p.first]], to_new[spans[p.second]], p.coef) for p in program.pairs)
    owner = np.repeat(np.arange(len(groups)), [g.width for g in groups])
    gathered = gather(linear, terms, (owner, np.asarray(ends)), {k: k for k in range(len(groups))})
    return gathered.unary, tuple(GroupPair(*pair) for pair in gathered.pairs)
