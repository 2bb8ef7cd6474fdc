"""Prices of links: what makes units of different groups agree, found on the concave problem at given mean counts.

With means ``n`` of the counts held, ``max c . r + r^T (H - N 1 1^T - D) r / 2 + d . r / 2`` over ``0 <= r <= 1`` with
``sum of r_g = n_g`` and all links is a concave quadratic program. An accelerated projected gradient on its augmented
Lagrangian gives ``r`` and a price for each link. Any non-negative prices give a valid bound; these give a good one.

References:
    Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm" (SIAM J. Imaging Sciences, 2009), with
    O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes" (2015); Rockafellar, "Augmented
    Lagrange multiplier functions" (1974), for the prices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.program import Program

BISECTIONS = 40
UPDATES = 6
"""Iterations between two updates of the prices."""
POWER_STEPS = 12


class LinkRows:
    """The links as rows ``L x <= 0``: a part not above its whole, a whole not above the sum of its parts.

    Attributes:
        matrix: ``(rows, n)``.
        count_matrix: what they say about counts, ``(count rows, groups)``: ``C n <= offset``.
        offset: ``(count rows,)``.
        owner: for each row the count row that it belongs to, ``(rows,)``.
    """

    def __init__(self, program: Program) -> None:
        links, size = program.links, program.size
        m, heads = len(links), links.heads
        row = np.arange(m)
        place = np.searchsorted(heads, links.wholes)
        part_rows = sp.csr_array(
            (np.repeat([1.0, -1.0], m), (np.tile(row, 2), np.concatenate([links.parts, links.wholes]))),
            shape=(m, size),
        )
        cover_rows = sp.csr_array(
            (
                np.concatenate([np.ones(len(heads)), -np.ones(m)]),
                (np.concatenate([np.arange(len(heads)), place]), np.concatenate([heads, links.parts])),
            ),
            shape=(len(heads), size),
        )
        self.matrix = sp.csr_array(sp.vstack([part_rows, cover_rows]))
        self.transposed = sp.csr_array(self.matrix.T)
        group_of, groups = program.group_of, len(program.groups)
        pairs = {(link.whole, link.part): k for k, link in enumerate(program.count_links)}
        covers = {g: len(pairs) + k for k, g in enumerate(sorted({whole for whole, _ in pairs}))}
        self.owner = np.asarray(
            [
                *(pairs[key] for key in zip(group_of[links.wholes], group_of[links.parts], strict=True)),
                *(covers[g] for g in group_of[heads].tolist()),
            ],
            np.int64,
        )
        self.count_matrix = np.zeros((len(pairs) + len(covers), groups))
        self.offset = np.zeros(len(self.count_matrix))
        covered = np.bincount(group_of[heads], minlength=groups)
        for k, link in enumerate(program.count_links):
            cover = covers[link.whole]
            self.count_matrix[k, link.part], self.count_matrix[k, link.whole] = 1.0, -link.fan
            self.offset[k] = link.loose
            self.count_matrix[cover, link.whole] = 1.0
            self.count_matrix[cover, link.part] = -link.spread
            self.offset[cover] = program.groups[link.whole].width - covered[link.whole]

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.matrix.shape[0])


class LinkPricer:
    """Finds means of units and prices of links at given mean counts; starts where the last call ended."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rows = LinkRows(program)
        self.prices = np.zeros(self.rows.count)
        self._starts = np.asarray([g.start for g in program.groups], np.int64)
        self._widths = np.asarray([g.width for g in program.groups], np.int64)

    def copy(self) -> LinkPricer:
        """Another one that starts from the same prices."""
        other = copy.copy(self)
        other.prices = self.prices.copy()
        return other

    def charge(self, prices: FloatArray) -> FloatArray:
        """What the prices take from the worth of each unit, ``(n,)``."""
        return np.asarray(self.rows.transposed @ prices)

    def spread(self, count_prices: FloatArray) -> FloatArray:
        """Prices of rows from prices of their sums, ``(rows,)``."""
        return np.asarray(count_prices[self.rows.owner])

    def solve(
        self,
        gradient: Callable[[FloatArray], FloatArray],
        curvature: FloatArray,
        start: FloatArray,
        counts: FloatArray,
        iterations: int,
    ) -> FloatArray:
        """Climb; the prices are updated on the way.

        Args:
            gradient: of the concave function, without links, ``(n,) -> (n,)``.
            curvature: ``(n,)`` positive: the diagonal ``d``; its double bounds the second derivative where the
                coupling has no sign of its own, and a power iteration finds the factor otherwise.
            start: ``(n,)``.
            counts: ``(groups,)`` means of the counts.
            iterations: gradient steps.

        Returns:
            The means of units, ``(n,)``.
        """
        matrix, back = self.rows.matrix, self.rows.transposed
        penalty = float(np.median(curvature))
        degree = np.asarray(abs(back) @ np.asarray(abs(matrix).sum(axis=1)).ravel())
        scale = curvature + penalty * degree
        scale = scale * _largest_ratio(gradient, scale, penalty * degree)
        r = self._projected(start, scale, counts)
        y, momentum = r, 1.0
        for k in range(iterations):
            pull = np.maximum(self.prices + penalty * (matrix @ y), 0.0)
            slope = gradient(y) - back @ pull
            ahead = self._projected(y + slope / scale, scale, counts)
            if (slope @ (ahead - r)) < 0:
                momentum = 1.0
            following = (1 + np.sqrt(1 + 4 * momentum * momentum)) / 2
            y = ahead + (momentum - 1) / following * (ahead - r)
            r, momentum = ahead, following
            if k % UPDATES == UPDATES - 1:
                self.prices = np.maximum(self.prices + penalty * (matrix @ r), 0.0)
                momentum = 1.0
        return r

    def _projected(self, point: FloatArray, scale: FloatArray, counts: FloatArray) -> FloatArray:
        """Nearest point of ``0 <= r <= 1``, ``sum of r_g = counts[g]``, distances weighted by ``scale``."""
        inverse = 1.0 / scale
        low = np.minimum.reduceat((point - 1.0) * scale, self._starts)
        high = np.maximum.reduceat(point * scale, self._starts)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            r = np.clip(point - np.repeat(middle, self._widths) * inverse, 0.0, 1.0)
            above = np.add.reduceat(r, self._starts) > counts
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.asarray(np.clip(point - np.repeat((low + high) / 2, self._widths) * inverse, 0.0, 1.0))


def _largest_ratio(
    gradient: Callable[[FloatArray], FloatArray], scale: FloatArray, extra: FloatArray
) -> float:
    """A factor that makes ``scale`` an upper bound of the curvature, by power iteration on the linear part."""
    base = gradient(np.zeros(len(scale)))
    v = np.random.default_rng(0).standard_normal(len(scale))
    ratio = 1.0
    for _ in range(POWER_STEPS):
        v /= np.linalg.norm(v)
        w = (base - gradient(v / np.sqrt(scale))) / np.sqrt(scale) + extra * v / scale
        ratio = float(np.linalg.norm(w))
        v = w
    return max(1.1 * ratio, 1.0)
