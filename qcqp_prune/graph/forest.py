"""Disjoint sets of integers, many joined and looked up at once, with marks that sets inherit.

References:
    Tarjan and van Leeuwen, "Worst-case analysis of set union algorithms" (J. ACM 1984).
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qcqp_prune.graph.channels import BoolArray, IntArray


class Forest:
    """Sets of the integers from 0 up, each alone at first; the root of a set is its smallest member.

    Work is linear in what is passed, but for the logarithm of sorting it and of paths that are not short yet: nothing
    ever runs over all integers.
    """

    def __init__(self, marks: tuple[str, ...] = ()) -> None:
        """Start with every integer alone and without marks.

        Args:
            marks: names of marks; a set has one where any of its members has it.
        """
        self._above: IntArray = np.arange(0, dtype=np.int64)
        self._marks: dict[str, BoolArray] = {name: np.zeros(0, np.bool_) for name in marks}

    def find(self, members: IntArray) -> IntArray:
        """The root of each one's set, in the shape of ``members``."""
        self._reach(members)
        roots: IntArray = self._above[members]
        while True:
            above = self._above[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._above[members] = roots
        return roots

    def join(self, a: IntArray, b: IntArray) -> None:
        """Make one set of those of ``a[i]`` and ``b[i]``, for every i; both ``(n,)``."""
        a, b = self.find(a), self.find(b)
        apart = a != b
        if not apart.any():
            return
        roots, places = np.unique(np.concatenate([a[apart], b[apart]]), return_inverse=True)
        pairs = places.reshape(2, -1)
        links = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(len(roots),) * 2)
        count, component = connected_components(links, directed=False)
        first = roots[np.unique(component, return_index=True)[1]]
        self._above[roots] = first[component]
        for marked in self._marks.values():
            some = np.zeros(count, np.bool_)
            some[component[marked[roots]]] = True
            marked[first] = some

    def mark(self, name: str, members: IntArray) -> None:
        """Give the sets of these members a mark."""
        roots = self.find(members)  # which may make room, in new arrays
        self._marks[name][roots] = True

    def is_marked(self, name: str, members: IntArray) -> BoolArray:
        """Whether the set of each has the mark, in the shape of ``members``."""
        roots = self.find(members)
        found: BoolArray = self._marks[name][roots]
        return found

    def numbered(self, size: int) -> IntArray:
        """The sets of the first ``size`` integers, numbered from 0 in the order of their roots, ``(size,)``."""
        everyone = np.arange(size, dtype=np.int64)
        roots = self.find(everyone)
        numbers: IntArray = (np.cumsum(roots == everyone) - 1)[roots]
        return numbers

    def _reach(self, members: IntArray) -> None:
        """Room for the largest of them; twice that, so that growing costs nothing in the long run."""
        needed = int(members.max(initial=-1)) + 1
        known = len(self._above)
        if needed > known:
            self._above = np.concatenate([self._above, np.arange(known, 2 * needed, dtype=np.int64)])
            for name, marked in self._marks.items():
                self._marks[name] = np.concatenate([marked, np.zeros(2 * needed - known, np.bool_)])
