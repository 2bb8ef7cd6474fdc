"""Which dimensions of a tensor a reshape turns into which."""

from __future__ import annotations


def blocks(shape: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of consecutive dimensions with equal products, ``[(old dims, new dims), ...]``."""
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(target):
        old, new = [], []
        p = q = 1
        if i < len(shape):
            old, p, i = [i], shape[i], i + 1
        if j < len(target):
            new, q, j = [j], target[j], j + 1
        while p != q:
            if (p < q and i < len(shape)) or j == len(target):
                old, p, i = [*old, i], p * shape[i], i + 1
            else:
                new, q, j = [*new, j], q * target[j], j + 1
        pairs.append((old, new))
    return pairs
