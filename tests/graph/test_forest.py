"""Disjoint sets agree with sets that are joined one pair at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcqp_prune.graph.forest import Forest

PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=8)


@given(steps=st.lists(st.tuples(PAIRS, st.lists(st.integers(0, 19), max_size=3)), max_size=6))
def test_it_agrees_with_joining_sets_one_by_one(
    steps: list[tuple[list[tuple[int, int]], list[int]]],
) -> None:
    forest, sets = Forest(("seen",)), [{k} for k in range(20)]
    marked: set[int] = set()
    for pairs, marks in steps:
        forest.join(*np.asarray(pairs, np.int64).reshape(-1, 2).T)
        for a, b in pairs:
            whole = sets[a] | sets[b]
            for member in whole:
                sets[member] = whole
        forest.mark("seen", np.asarray(marks, np.int64))
        marked |= set(marks)
        everyone = np.arange(20)
        assert forest.find(everyone).tolist() == [min(s) for s in sets]
        assert forest.is_marked("seen", everyone).tolist() == [bool(s & marked) for s in sets]
        roots = sorted({min(s) for s in sets})
        assert forest.numbered(20).tolist() == [roots.index(min(s)) for s in sets]
        assert forest.find(np.asarray([[3, 4], [19, 0]])).tolist() == [
            [min(sets[3]), min(sets[4])],
            [min(sets[19]), min(sets[0])],
        ]
