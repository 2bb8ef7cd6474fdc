"""Certificates that were tampered with so that rejection is the right answer, and the bound by brute force."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

Arrays = dict[str, np.ndarray]


def load(path: Path) -> tuple[dict[str, Any], Arrays]:
    data = json.loads(path.read_text())
    return data, dict(safetensors.numpy.load(path.with_name(data["arrays"]["file"]).read_bytes()))


def store(path: Path, data: dict[str, Any], arrays: Arrays, *, signed: bool = True) -> None:
    """Write both files; ``signed``: with checksums made anew, as an attacker would."""
    content = safetensors.numpy.save({k: np.ascontiguousarray(a) for k, a in arrays.items()})
    data = copy.deepcopy(data)
    data["arrays"]["file"] = path.stem + ".arrays.safetensors"
    if signed:
        data["arrays"]["sha256"] = hashlib.sha256(content).hexdigest()
        data.pop("digest", None)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.with_name(data["arrays"]["file"]).write_bytes(content)
    path.write_text(json.dumps(data))


class Brute:
    """A certificate's program and bound from their definitions: dense matrices, and every 0/1 point."""

    def __init__(self, data: dict[str, Any], arrays: Arrays) -> None:
        self.data, self.arrays, self.groups = data, arrays, data["program"]["groups"]
        starts = np.cumsum([0, *(g["width"] for g in self.groups)])
        self.spans = [slice(a, b) for a, b in itertools.pairwise(starts.tolist())]
        n = int(starts[-1])
        self.coupling = np.zeros((n, n))
        for k, (g, h) in enumerate(data["program"]["pairs"]):
            self.coupling[self.spans[g], self.spans[h]] = arrays[f"pairs.{k}"]
        points = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        counts = np.stack([points[:, s].sum(1) for s in self.spans], 1)
        allowed = np.ones(len(points), bool)
        ties: dict[int, int] = {}
        for g, group in enumerate(self.groups):
            first = ties.setdefault(group["tie"], g)
            allowed &= np.isin(counts[:, g], group["counts"]) & (counts[:, g] == counts[:, first])
        for g, needed in data["program"].get("needs", []):
            allowed &= (counts[:, g] == 0) | (counts[:, needed] > 0)
        self.points, self.counts = points[allowed].astype(float), counts[allowed]

    def worth(self, x: np.ndarray) -> np.ndarray:
        pairs = np.einsum("ki,ij,kj->k", x, self.coupling, x)
        return self.data["program"]["constant"] + x @ self.arrays["linear"] + pairs

    def uses(self, row: dict[str, Any]) -> np.ndarray:
        total = row["constant"] + self.counts @ np.asarray(row["linear"])
        for a, *sums in row["products"]:
            total = total + a * np.prod([sum(k * self.counts[:, g] for g, k in s) for s in sums], axis=0)
        for t in row["tables"]:
            sums = [
                sum((k * self.counts[:, g] for g, k in t[s]), 0 * self.counts[:, 0])
                for s in ("first", "second")
            ]
            levels = (t["first_levels"], t["second_levels"])
            i, j = (
                [next(k for k, x in enumerate(part) if x >= n) for n in s]
                for part, s in zip(levels, sums, strict=True)
            )
            total = total + np.asarray(t["values"])[i, j]
        return total

    def matrix(self) -> np.ndarray:
        given, x = self.data["proof"]["multipliers"], self.coupling
        out = np.diag(self.arrays[given["diagonal"]]) - x - x.T
        lift = zip(self.arrays[given["lift"]["values"]], given["lift"]["products"], strict=True)
        for v, sums in lift:
            sides = [np.zeros(len(out)), np.zeros(len(out))]
            for side, part in zip(sides, sums, strict=True):
                for g, k in part:
                    side[self.spans[g]] += k
            out += v * (np.outer(*sides) + np.outer(*sides[::-1]))
        return out

    def smallest_eigenvalue(self) -> float:
        return float(np.linalg.eigvalsh(self.matrix())[0])

    def bound(self) -> float:
        """The largest value over all 0/1 points with allowed counts of the concave majorant with its prices."""
        given, m, x = self.data["proof"]["multipliers"], self.matrix(), self.points
        r, d = self.arrays[given["centre"]], self.arrays[given["diagonal"]]
        coupled = np.einsum("ki,ij,kj->k", x, m, x)
        tangent = 2 * x @ m @ r - r @ m @ r
        # x^T M x - tangent = (x - r)^T M (x - r): what the linearisation gives away.
        values = self.worth(x) + (coupled - tangent) / 2 + (x - x * x) @ d / 2
        for price, row in zip(self.arrays[given["prices"]], self.data["program"]["constraints"], strict=True):
            values = values + price * (row["limit"] - self.uses(row))
        if "links" in given:
            wholes, parts = self.arrays["wholes"], self.arrays["parts"]
            rows = [x[:, w] - x[:, p] for w, p in zip(wholes, parts, strict=True)]
            rows += [x[:, parts[wholes == w]].sum(1) - x[:, w] for w in np.unique(wholes)]
            values = values + np.stack(rows, 1) @ self.arrays[given["links"]]
        return float(values.max())


Tamper = Callable[[np.random.Generator, dict[str, Any], Arrays], bool]


def _name(data: dict[str, Any], kind: str) -> str:
    given = data["proof"]["multipliers"]
    return given["lift"]["values"] if kind == "lift" else given[kind]


def _wrong(data: dict[str, Any], arrays: Arrays) -> bool:
    """Whether the multipliers prove less than is claimed, or nothing at all."""
    brute = Brute(data, arrays)
    return brute.smallest_eigenvalue() < -1e-8 or brute.bound() > data["claim"]["bound"] + 1e-7


def lower_bound(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    data["claim"]["bound"] = Brute(data, arrays).bound() * (1 - 10.0 ** rng.uniform(-9, -1))
    return True


def lower_diagonal(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    d = arrays[_name(data, "diagonal")]
    d -= max(Brute(data, arrays).smallest_eigenvalue(), 0.0) + 10.0 ** rng.uniform(-7, 0)
    return True


def one_diagonal_entry(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    d = arrays[_name(data, "diagonal")]
    d[rng.integers(len(d))] -= 10.0 ** rng.uniform(-3, 1)
    return _wrong(data, arrays)


def move_lift(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    values = arrays[_name(data, "lift")]
    values += rng.normal(size=len(values)) * 10.0 ** rng.uniform(-3, 1)
    return _wrong(data, arrays)


def move_centre(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    centre = arrays[_name(data, "centre")]
    centre += rng.normal(size=len(centre)) * 10.0 ** rng.uniform(-1, 1)
    return _wrong(data, arrays)


def move_prices(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    prices = arrays[_name(data, "prices")]
    prices *= np.exp(rng.normal(size=len(prices)) * 2)
    prices += 10.0 ** rng.uniform(-6, 0, len(prices)) * rng.integers(2)
    return _wrong(data, arrays)


def negative_price(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    prices = arrays[_name(data, "prices")]
    prices[rng.integers(len(prices))] = -(10.0 ** rng.uniform(-300, 0))
    data["claim"]["bound"] *= 10  # high enough, so that nothing but the sign is wrong
    return True


def flip_mask(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    brute, mask = Brute(data, arrays), arrays["mask"]
    before = brute.worth(mask[None].astype(float))[0]
    flips = rng.choice(len(mask), size=rng.integers(1, 3), replace=False)
    mask[flips] = 1 - mask[flips]
    return abs(float(brute.worth(mask[None].astype(float))[0]) - float(before)) > 1e-6


def raise_objective(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    data["selection"]["objective"] += abs(data["selection"]["objective"]) * 10.0 ** rng.uniform(-8, 0)
    return True


def lower_limit(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    """Below what the mask uses."""
    brute = Brute(data, arrays)
    row = data["program"]["constraints"][rng.integers(len(data["program"]["constraints"]))]
    brute.counts = np.asarray([[int(arrays["mask"][s].sum()) for s in brute.spans]])
    row["limit"] = int(brute.uses(row)[0]) - int(rng.integers(1, 10))
    return True


def raise_limit(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    """Another problem, for which the multipliers prove a higher bound than the one claimed."""
    data["program"]["constraints"][0]["limit"] += int(rng.integers(1, 1000))
    return _wrong(data, arrays)


def not_a_number(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    kind = str(rng.choice(["diagonal", "centre", "prices", "lift"]))
    array = arrays[_name(data, kind)]
    array[rng.integers(len(array))] = rng.choice([np.nan, np.inf, -np.inf])
    return True


def drop_array(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    del arrays[str(rng.choice(sorted(arrays)))]
    return True


def shorten_array(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    name = str(
        rng.choice([_name(data, k) for k in ("diagonal", "centre", "prices", "lift")] + ["linear", "mask"])
    )
    arrays[name] = arrays[name][:-1]
    return True


def unknown_kind(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    data["proof"]["multipliers"]["magic"] = _name(data, "centre")
    return True


def drop_key(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    place = data[str(rng.choice(["program", "selection", "claim", "proof", "hints"]))]
    del place[str(rng.choice(sorted(place)))]
    return True


def forget_a_budget(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    data["program"]["constraints"].pop()
    return True


def share_of_zero(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    """A hinted sum that no count satisfies would make every table empty, and the bound as low as one likes."""
    total = len({g["tie"] for g in data["program"]["groups"]}) + len(data["hints"]["sums"])
    data["hints"]["sums"].append([0, 0, 0])
    data["hints"]["counts"].insert(0, total)
    data["claim"]["bound"] *= 0.5
    return True


def forget_a_need(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    """Without it more selections are allowed, and the bound of the rest need not hold for them."""
    needs = data["program"].get("needs", [])
    if needs:
        needs.pop(int(rng.integers(len(needs))))
    return bool(needs)


def need_more(rng: np.random.Generator, data: dict[str, Any], arrays: Arrays) -> bool:
    """A need that the mask breaks."""
    mask, groups = arrays["mask"], data["program"]["groups"]
    starts = np.cumsum([0, *(g["width"] for g in groups)])
    counts = [int(mask[a:b].sum()) for a, b in itertools.pairwise(starts.tolist())]
    empty, kept = [[g for g, n in enumerate(counts) if (n > 0) == side] for side in (False, True)]
    if empty and kept:
        data["program"].setdefault("needs", []).append([kept[0], empty[0]])
    return bool(empty and kept)


KINDS: dict[str, Tamper] = {
    f.__name__: f
    for f in (
        lower_bound,
        lower_diagonal,
        one_diagonal_entry,
        move_lift,
        move_centre,
        move_prices,
        negative_price,
        flip_mask,
        raise_objective,
        lower_limit,
        raise_limit,
        not_a_number,
        drop_array,
        shorten_array,
        unknown_kind,
        drop_key,
        forget_a_budget,
        share_of_zero,
    )
}
