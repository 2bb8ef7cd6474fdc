"""An independent checker of bounds, in one file: it needs numpy and safetensors, and nothing else of this library.

    python -m qcqp_prune.certify FILE        or, where the library is not installed:  python certify.py FILE

For 0/1 points x with counts n, the symmetric coupling H, any lift N with ``n^T N n / 2 = sum_e v_e F_e(n) S_e(n)``, any
d and r, and prices p >= 0 of the budgets: where ``M = diag(d) + N 1 1^T - H`` is positive semidefinite,

    worth(x) <= constant + r^T M r / 2 + alpha . x + sum_e v_e F_e(n) S_e(n) + sum_b p_b (limit_b - use_b(n)),
    alpha = linear + d / 2 - M r  (+ what the prices of links, at least 0 as well, move between units).

The right side is largest for the best units at some counts; which counts, is found exactly. Only the file says what the
program is. Its hints (orders of elimination) make the check fast or make it fail, never a wrong bound pass.
Rounding: a sum of k rounded terms, in any order, is off by at most k u / (1 - k u) times their sizes, u = 2^-53.

References:
    Rump, "Verification of positive definiteness" (BIT 46, 2006): a floating-point factorisation of the shifted matrix
    proves definiteness. Here its residual is computed too, so that nothing is assumed of how it was obtained.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

KINDS = {"lift", "diagonal", "centre", "prices", "links"}
CHUNK, LARGEST = (
    1 << 19,
    1 << 28,
)  # entries of a table of counts that are worked on at once, and that one may have
ROW = {"kind", "name", "unit", "limit", "constant", "linear", "products", "tables"}
FAILURES = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, ArithmeticError)

Lift = dict[tuple[int, int], list[float]]


class Rejected(Exception):
    """The file does not prove what it claims; the message says why."""


@dataclass(frozen=True)
class Verdict:
    """What is proved: worth of the mask, the bound with all rounding, at most the one claimed, and the claimed gap."""

    objective: float
    bound: float
    claimed: float
    gap: float | None
    seconds: float


def certify(path: str | Path) -> Verdict:
    """Check a certificate.

    Raises:
        Rejected: anything in it is wrong, missing, damaged, or not proved.
    """
    started = time.perf_counter()
    try:
        with np.errstate(all="ignore"):
            check = _Check(*_read(Path(path)))
            worth, claimed = check.selection(), check.data["claim"]["bound"]
            bound = check.bound(check.data["proof"], check.allowed)
            _need(bound <= claimed, f"the multipliers prove {bound!r}, not the claimed {claimed!r}")
            _need(
                worth <= claimed + check.slip, f"the mask is worth {worth!r}, more than the bound {claimed!r}"
            )
    except (*FAILURES, safetensors.SafetensorError, RecursionError, MemoryError) as error:
        raise Rejected(f"it is damaged, incomplete or too large ({type(error).__name__}: {error})") from error
    gap = max(claimed - worth, 0.0) / abs(worth) if worth else None
    return Verdict(worth, bound, claimed, gap, time.perf_counter() - started)


def _need(holds: Any, why: str) -> None:
    """Reject unless a condition holds; one with a NaN in it never does."""
    if not holds:
        raise Rejected(why)


def _gamma(terms: int) -> float:
    """Relative error of a sum of rounded terms; doubled, for the sizes are rounded themselves."""
    return 2 * terms * 2.0**-53 / (1 - terms * 2.0**-53)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both files: checksums right, every number finite."""
    data = json.loads(path.read_bytes())
    _need(data["format"] == "qcqp-prune certificate" and data["schema"] == 1, "no certificate of schema 1")
    body = {key: data[key] for key in data if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    _need(hashlib.sha256(text.encode()).hexdigest() == data["digest"], "the checksum of the file is wrong")
    content = path.with_name(Path(data["arrays"]["file"]).name).read_bytes()
    _need(
        hashlib.sha256(content).hexdigest() == data["arrays"]["sha256"], "the checksum of the arrays is wrong"
    )
    arrays: dict[str, Any] = dict(safetensors.numpy.load(content))
    for name, array in arrays.items():
        kind = {"mask": np.uint8, "wholes": np.int64, "parts": np.int64}.get(name, np.float64)
        _need(array.dtype == kind and np.isfinite(array).all(), f"{name} holds NaN or is of another type")
    return data, arrays


class _Check:
    """The program of a file, and what is to be checked of it."""

    def __init__(self, data: dict[str, Any], arrays: dict[str, Any]) -> None:
        self.data, self.arrays, self.program, self.hints = data, arrays, data["program"], data["hints"]
        self.groups, self.rows, self.slip = self.program["groups"], self.program["constraints"], 0.0
        starts = itertools.accumulate((g["width"] for g in self.groups), initial=0)
        self.spans = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.size, order = self.spans[-1].stop, dict[int, int]()
        self.class_of = [order.setdefault(g["tie"], len(order)) for g in self.groups]
        self.allowed = [set(range(self.size + 1)) for _ in order]
        for group, c in zip(self.groups, self.class_of, strict=True):
            self.allowed[c] &= {n for n in group["counts"] if 0 <= n <= group["width"]}
        self.blocks: dict[tuple[int, int], Any] = {}
        for k, (g, h) in enumerate(self.program["pairs"]):
            _need(0 <= g <= h < len(self.groups) and (g, h) not in self.blocks, "pairs of groups in disorder")
            block = arrays[f"pairs.{k}"]
            _need(
                block.shape == (self.groups[g]["width"], self.groups[h]["width"]), "a pair of a wrong shape"
            )
            _need(g != h or not np.tril(block).any(), "pairs within a group are not upper triangular")
            self.blocks[g, h] = block + block.T if g == h else block
        for row in self.rows:
            known = row["kind"] == "sums" and row.keys() <= ROW
            _need(known, f"unknown kind of budget {row['kind']!r} {sorted(row)}: take a newer checker")
            for levels in (t[side] for t in row["tables"] for side in ("first_levels", "second_levels")):
                _need(levels == sorted(set(levels)), "the levels of a table do not ascend")
        _need(arrays["linear"].shape == (self.size,), "the linear terms have a wrong length")
        self.needs = [(g, h) for g, h in self.program.get("needs", [])]
        _need(
            all(k in range(len(self.groups)) for pair in self.needs for k in pair),
            "a group that is needed is none",
        )
        self.definite: set[str] = set()

    def selection(self) -> float:
        """Worth of the mask, which is feasible in integers."""
        x, linear = self.arrays["mask"], self.arrays["linear"]
        one, wholes, parts = x == 1, self.arrays["wholes"], self.arrays["parts"]
        _need(x.shape == (self.size,) and (one | (x == 0)).all(), "the mask is not 0 or 1 for each unit")
        n = [int(one[s].sum()) for s in self.spans]
        for g, c in enumerate(self.class_of):
            _need(
                n[g] in self.allowed[c] and n[g] == n[self.class_of.index(c)],
                f"group {g} may not keep {n[g]}",
            )
        for row in self.rows:
            use = row["constant"] + sum(a * k for a, k in zip(row["linear"], n, strict=True))
            for a, *sums in row["products"]:
                use += a * math.prod(sum(share * n[g] for g, share in part) for part in sums)
            for t in row["tables"]:
                i, j = (
                    bisect_left(t[f"{k}_levels"], sum(a * n[g] for g, a in t[k])) for k in ("first", "second")
                )
                use += t["values"][i][j]
            _need(use <= row["limit"], f"the mask uses {use} of {row['name']}, at most {row['limit']}")
        _need(
            all(n[h] or not n[g] for g, h in self.needs), "the mask keeps a group without one that it needs"
        )
        kept = np.zeros(self.size, bool)
        kept[wholes[one[parts]]] = True
        _need((kept == one)[wholes].all(), "the mask breaks a link between units")
        terms = [self.program["constant"], *linear[one]]
        for (g, h), block in self.blocks.items():
            terms += (block[np.ix_(one[self.spans[g]], one[self.spans[h]])].sum(1) / (1 + (g == h))).tolist()
        sizes = [np.abs(linear).sum(), *(np.abs(block).sum() for block in self.blocks.values())]
        self.slip = _gamma(self.size + 64) * (math.fsum(sizes) + abs(self.program["constant"]))
        worth, claim = math.fsum(terms), self.data["selection"]["objective"]
        _need(abs(worth - claim) <= self.slip, f"the mask is worth {worth!r}, not {claim!r}")
        return worth

    def bound(self, node: dict[str, Any], allowed: list[set[int]]) -> float:
        """What a tree proves: a leaf holds multipliers, a branching splits the counts of a group in two."""
        if "split" in node:
            c, most = self.class_of[node["split"]["group"]], node["split"]["at_most"]
            low, high = ({n for n in allowed[c] if (n <= most) == side} for side in (True, False))
            cases = [(node["low"], low), (node["high"], high)]
            return max(self.bound(sub, [*allowed[:c], part, *allowed[c + 1 :]]) for sub, part in cases)
        given = node["multipliers"]
        _need(
            given.keys() <= KINDS, f"unknown multipliers {sorted(given.keys() - KINDS)}: take a newer checker"
        )
        d, r, prices = (self.arrays[given[kind]] for kind in ("diagonal", "centre", "prices"))
        values, products = self.arrays[given["lift"]["values"]].tolist(), given["lift"]["products"]
        terms = [(v, *sums) for v, sums in zip(values, products, strict=True)]
        _need(d.shape == r.shape == (self.size,), "the multipliers have a wrong length")
        _need(prices.shape == (len(self.rows),) and (prices >= 0).all(), "a price is negative or missing")
        lift: Lift = {}
        for v, first, second in terms:
            for (g, a), (h, b) in itertools.product(first, second):
                lift.setdefault((min(g, h), max(g, h)), []).append(v * ((1 + (g == h)) * a * b))
        name = json.dumps([given["lift"], given["diagonal"]])
        if name not in self.definite:
            self.require_definite(d, lift)
            self.definite.add(name)
        if not all(allowed):
            return -math.inf
        alpha, parts = self.linearised(d, r, lift)
        if "links" in given:
            alpha, moved = self.moved(alpha, self.arrays[given["links"]])
            parts.append(moved)
        slopes = [0.0] * len(self.groups)
        for p, row in zip(prices.tolist(), self.rows, strict=True):
            parts += [p * row["limit"], -p * row["constant"]]
            slopes = [s - p * a for s, a in zip(slopes, row["linear"], strict=True)]
            uses = [a * g["width"] for a, g in zip(row["linear"], self.groups, strict=True)]
            parts.append(_gamma(len(self.rows) + 4) * p * sum(map(abs, uses)))
            terms += [(-p * a, first, second) for a, first, second in row["products"]]
        tables = [(p, t) for p, row in zip(prices.tolist(), self.rows, strict=True) for t in row["tables"]]
        best = _Counts(self, allowed).best(alpha, slopes, terms, tables)
        if -math.inf in best and math.isfinite(math.fsum(map(abs, parts)) + best[-1]):
            return -math.inf  # nothing overflowed: no counts of this case suit each other
        parts += best
        total = math.fsum([*parts, _gamma(8) * math.fsum(map(abs, parts))])
        _need(math.isfinite(total), "the multipliers prove no finite bound")
        return total

    def linearised(self, d: Any, r: Any, lift: Lift) -> tuple[Any, list[float]]:
        """``alpha`` rounded up, and terms whose sum is at least ``constant + r^T M r / 2``."""
        product, size, linear = d * r, np.abs(d * r), self.arrays["linear"]
        for key in {*self.blocks, *lift}:
            n, m = (math.fsum(map(f, lift.get(key, []))) for f in (float, abs))
            block = self.blocks.get(key, np.zeros((1, 1)))
            for (g, h), part in {key: block, key[::-1]: block.T}.items():
                to, other = self.spans[g], r[self.spans[h]]
                product[to] += n * other.sum() - (part @ other if key in self.blocks else 0.0)
                size[to] += m * np.abs(other).sum() + (
                    np.abs(part) @ np.abs(other) if key in self.blocks else 0.0
                )
        slip = _gamma(self.size + len(lift) + 64) * (size + np.abs(d) + np.abs(linear))
        alpha = linear + d / 2 - product + slip
        return alpha, [self.program["constant"], *(r * product / 2), *(np.abs(r) * slip)]

    def moved(self, alpha: Any, prices: Any) -> tuple[Any, float]:
        """Prices of links: of each part not above its whole, then of each whole not above the sum of its parts."""
        wholes, parts = self.arrays["wholes"], self.arrays["parts"]
        heads, place = np.unique(wholes, return_inverse=True)
        _need(
            prices.shape == (len(wholes) + len(heads),) and (prices >= 0).all(),
            "a price of links is negative",
        )
        part, cover, alpha = prices[: len(wholes)], prices[len(wholes) :], alpha.copy()
        np.add.at(alpha, wholes, part)
        np.add.at(alpha, parts, cover[place] - part)
        np.add.at(alpha, heads, -cover)
        size = math.fsum([*part, *cover[place], *np.abs(alpha)])
        return alpha, _gamma(4 * len(prices) + 8) * 4 * size

    def require_definite(self, d: Any, lift: Lift) -> None:
        """``M`` is positive semidefinite: scaled and shifted it is ``L L^T`` up to less than the shift."""
        order, width, spans = self.hints["groups"], [g["width"] for g in self.groups], self.spans
        _need(sorted(order) == list(range(len(width))), "the hinted order of groups is no permutation")
        place = {g: k for k, g in enumerate(order)}
        own = d + np.repeat([math.fsum(lift.get((g, g), [])) for g in range(len(width))], width)
        _need((own > 0).all(), "the matrix is not positive semidefinite: its diagonal is not positive")
        scale = 2.0 ** -np.rint(np.log2(own) / 2)  # powers of two do not round
        shift = (self.size + 1000) * 2.0**-42

        def scaled(late: int, early: int) -> Any:
            key, cut = (min(late, early), max(late, early)), spans[late]
            block = self.blocks.get(key, np.zeros((width[key[0]], width[key[1]])))
            block = math.fsum(lift.get(key, [])) - (block if late == key[0] else block.T)
            block = block * scale[cut, None] * scale[None, spans[early]]
            return block + np.diag(d[cut] * scale[cut] ** 2 - shift) if late == early else block

        formed = np.abs(d)
        for g, h in {*self.blocks, *lift}:
            part = np.abs(self.blocks.get((g, h), np.zeros((width[g], width[h]))))
            part = part + math.fsum(map(abs, lift.get((g, h), [])))
            formed[spans[g]] += part.sum(1)
            formed[spans[h]] += part.sum(0) * (g != h)
        columns: dict[int, dict[int, Any]] = {g: {} for g in order}
        for g, h in {*self.blocks, *lift, *((g, g) for g in order)}:
            late, early = sorted((g, h), key=place.__getitem__, reverse=True)
            columns[early][late] = scaled(late, early)
        for k in order:
            _eliminate(columns, place, k)
        off = np.zeros(self.size)
        for early, late in [(k, i) for k in order for i in columns[k]]:
            rest = scaled(late, early)
            for k in order[: place[early] + 1]:
                if late in columns[k] and early in columns[k]:
                    rest -= columns[k][late] @ columns[k][early].T
            off[spans[late]] += np.abs(rest).sum(1)
            off[spans[early]] += np.abs(rest).sum(0) * (early != late)
        length = {i: 64 + sum(width[k] for k in order if i in columns[k]) for i in order}
        for k in order:
            across = sum(np.abs(part).sum(0) for part in columns[k].values())
            for i, part in columns[k].items():
                off[spans[i]] += _gamma(2 * length[i]) * (np.abs(part) @ across)
        # The norm of a symmetric matrix is at most its largest row sum, also that of a matrix similar to it.
        entry = _gamma(8 + max(map(len, lift.values()), default=0))
        worst = float(off.max() + entry * (formed * scale**2 + shift).max())
        _need(worst * 1.01 <= shift, f"the matrix is not proved semidefinite ({worst:.1e} above {shift:.1e})")


def _eliminate(columns: dict[int, dict[int, Any]], place: dict[int, int], k: int) -> None:
    """One group of a Cholesky factorisation; the column becomes that of the factor."""
    column = columns[k]
    try:
        column[k] = np.linalg.cholesky(column[k])
    except np.linalg.LinAlgError:
        raise Rejected("the matrix is not positive semidefinite: it has no Cholesky factor") from None
    rows = sorted(column.keys() - {k}, key=place.__getitem__)
    for i in rows:
        column[i] = np.linalg.solve(column[k], column[i].T).T
    for a, early in enumerate(rows):
        for late in rows[a:]:
            columns[early][late] = columns[early].get(late, 0.0) - column[late] @ column[early].T


def _entry(table: Any, scope: tuple[int, ...], at: dict[int, Any]) -> Any:
    return table[tuple(at[v] for v in scope)]


def _product(first: Any, second: Any, scope: tuple[int, int], at: dict[int, Any]) -> Any:
    return first[at[scope[0]]] * second[at[scope[1]]]


class _Counts:
    """The largest value over counts, by elimination of variables: counts of tied groups, and sums of them."""

    def __init__(self, check: _Check, allowed: list[set[int]]) -> None:
        self.check, self.order = check, check.hints["counts"]
        self.values = [np.asarray(sorted(a), np.float64) for a in allowed]
        self.relations: list[tuple[int, int, int, int]] = []
        forms: list[dict[int, int]] = [{c: 1} for c in range(len(allowed))]
        for definition in check.hints["sums"]:  # of one variable each: zero, or part + share * single
            total, form, values = len(forms), dict[int, int](), np.zeros(1)
            if definition:
                part, single, share = definition
                known = part in range(total) and single in range(total) and share in range(1, 1 << 30)
                _need(known, "a hinted sum of counts is none")
                form = {
                    c: forms[part].get(c, 0) + share * forms[single].get(c, 0) for c in range(len(allowed))
                }
                values = np.unique(np.add.outer(self.values[part], share * self.values[single]))
                self.relations.append((total, part, single, share))
            forms.append({c: k for c, k in form.items() if k})
            self.values.append(values)
        self.index = {tuple(sorted(form.items())): v for v, form in enumerate(forms)}
        _need(sorted(self.order) == list(range(len(forms))), "the hinted order of counts is no permutation")

    def best(self, alpha: Any, slopes: list[float], terms: list[Any], tables: list[Any]) -> list[float]:
        """``max alpha . x + slopes . n + products - tables`` as a sum, rounding included."""
        size, unary = 0.0, [np.zeros(len(v)) for v in self.values]
        for span, slope, c in zip(self.check.spans, slopes, self.check.class_of, strict=True):
            ranked, n = np.sort(alpha[span])[::-1], self.values[c]
            unary[c] += np.concatenate([[0.0], np.cumsum(ranked)])[n.astype(int)] + slope * n
            size += math.fsum(np.abs(ranked)) + abs(slope) * float(n[-1])
        pairs: Lift = {}
        for v, *sums in terms:
            (a, k), (b, m) = (self.variable(part) for part in sums)
            pairs.setdefault((min(a, b), max(a, b)), []).append(v * (k * m))
        factors: list[Any] = [((v,), partial(_entry, u, (v,))) for v, u in enumerate(unary)]
        for (a, b), values in pairs.items():
            first, second = math.fsum(values) * self.values[a], self.values[b]
            factors.append(((a, b), partial(_product, first, second, (a, b))))
            size += math.fsum(map(abs, values)) * float(np.abs(self.values[a]).max() * np.abs(second).max())
        for price, t in tables:
            pair, places = [], []
            for side in ("first", "second"):
                v, k = self.variable(t[side]) if t[side] else (-1, 0)
                pair += [v] if t[side] else []
                places.append(np.searchsorted(t[f"{side}_levels"], k * self.values[v] if k else [0.0]))
            looked = -price * np.asarray(t["values"], np.float64)[np.ix_(*places)]
            looked = (
                looked.diagonal()
                if pair[1:] == pair[:1]
                else looked.reshape([len(self.values[v]) for v in pair])
            )
            factors.append((scope := tuple(dict.fromkeys(pair)), partial(_entry, looked, scope)))
            size += float(np.abs(looked).max())
        # A count above zero without the one that it needs is worth minus infinity.
        for g, needed in self.check.needs:
            a, b = self.check.class_of[g], self.check.class_of[needed]
            if a != b:
                barred = np.where(np.logical_and.outer(self.values[a] > 0, self.values[b] == 0), -np.inf, 0.0)
                both: tuple[int, ...] = (a, b)
                factors.append((both, partial(_entry, barred, both)))
        error = _gamma(4 * (len(factors) + len(terms)) + self.check.size) * size
        for v in self.order:
            factors = self.without(v, factors)
        return [*(float(table({})) for _, table in factors), error]

    def variable(self, shares: list[list[int]]) -> tuple[int, int]:
        """The variable of a sum over groups, and the common factor that it leaves out."""
        form: dict[int, int] = {}
        for g, share in shares:
            form[self.check.class_of[g]] = form.get(self.check.class_of[g], 0) + share
        common = math.gcd(*form.values())
        return self.index[tuple(sorted((c, k // common) for c, k in form.items()))], common

    def without(self, v: int, factors: list[Any]) -> list[Any]:
        """Maximise over a variable; one that is part of a sum is looked up from the other two instead."""
        bucket = sorted((f for f in factors if v in f[0]), key=lambda f: len(f[0]))
        tied = [r for r in self.relations if v in r[:3]]
        _need(len(tied) <= 1, "the hinted order of counts eliminates a variable of two sums")
        scope = sorted({u for s in (*(f[0] for f in bucket), *(r[:3] for r in tied)) for u in s} - {v})
        shape, own = [len(self.values[u]) for u in scope], len(self.values[v])
        largest = max(math.prod(shape), math.prod(shape[1:]) * own)
        _need(largest <= LARGEST, "the hinted order of counts needs too large a table")
        at = dict(zip((*scope, v), np.ogrid[tuple(slice(k) for k in (*shape, own))], strict=True))
        rows, out = max(1, CHUNK // (math.prod(shape[1:]) * own)), np.empty(shape or 1)
        for start in range(0, len(out), rows):
            here, none = dict(at), np.zeros(1, bool)
            if scope:
                here[scope[0]] = at[scope[0]][start : start + rows]
            if tied:
                here[v], none = self.looked_up(v, tied[0], here)
            total = sum((table(here) for _, table in bucket), np.zeros([1] * len(at)))
            out[start : start + rows] = np.where(none, -np.inf, total).max(-1)
        self.relations = [r for r in self.relations if r not in tied]
        rest = [f for f in factors if v not in f[0]]
        return [*rest, (tuple(scope), partial(_entry, out if scope else out[0], tuple(scope)))]

    def looked_up(self, v: int, relation: tuple[int, int, int, int], at: dict[int, Any]) -> tuple[Any, Any]:
        """Where the value of a variable of ``total = part + share * single`` stands, and where there is none."""
        total, part, single, share = relation
        n = {u: self.values[u][at[u]] for u in relation[:3] if u != v}
        if v == total:
            wanted = n[part] + share * n[single]
        else:
            wanted = n[total] - share * n[single] if v == part else (n[total] - n[part]) / share
        place = np.searchsorted(self.values[v], wanted).clip(max=len(self.values[v]) - 1)
        return place, self.values[v][place] != wanted


def main(arguments: list[str]) -> int:
    """Check the files named, one line each; 0 where all are accepted."""
    failed = not arguments
    for name in arguments:
        try:
            v = certify(name)
            said = f"ACCEPTED: worth {v.objective:.9g}, no selection is worth more than {v.claimed:.9g}"
            said += "" if v.gap is None else f" (gap {v.gap:.4%})"
        except Rejected as why:
            failed, said = True, f"REJECTED: {why}"
        sys.stdout.write(f"{name}: {said}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
