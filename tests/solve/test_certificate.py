"""Certificates prove what they claim, the checker agrees with brute force, and tampered ones are rejected."""

from __future__ import annotations

import copy
import itertools
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qcqp_prune as qp
from qcqp_prune import certify as checker
from qcqp_prune.certify import Rejected, certify
from qcqp_prune.program.program import Program
from qcqp_prune.solve.certificate import Certificate, differences, stored_limits
from qcqp_prune.solve.proof import Branching, Proof
from qcqp_prune.testing import STRUCTURES, chain_problem, exhaustive, random_problem
from qcqp_prune.testing.instances import LINKED
from qcqp_prune_solvers.decomposition.proofs import proof_of
from qcqp_prune_solvers.decomposition.relaxation import Relaxation
from tests.tampering import KINDS, Brute, load, store

TAMPERED = ("chain", "residual", "concat")


def written(path: Path, seed: int, structure: str, work: int = 6) -> qp.SolveReport:
    problem = random_problem(seed, structure)
    report = qp.solve(problem, "decomposition", options=qp.SolveOptions(work_limit=work, gap_limit=0.0))
    report.write_certificate(path)
    return report


def check_soundness(path: Path, seed: int, structure: str) -> None:
    best = exhaustive(random_problem(seed, structure)).objective
    report = written(path, seed, structure)
    verdict = certify(path)
    assert verdict.objective == pytest.approx(report.objective, rel=1e-12)
    assert verdict.claimed == report.bound
    assert verdict.objective <= best + 1e-9 * abs(best)
    assert verdict.bound >= best - 1e-12 * abs(best)
    assert verdict.bound <= verdict.claimed
    # The report may lift a bound to its own selection's worth, where both are equal but for rounding.
    data, arrays = load(path)
    proved = Brute(data, arrays).bound()
    assert verdict.bound >= proved
    assert verdict.bound <= proved + 1e-10 * abs(proved)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("seed", range(2))
def test_bounds_are_sound_and_certified(tmp_path: Path, seed: int, structure: str) -> None:
    check_soundness(tmp_path / "c.json", seed, structure)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_forty_more_of_each_structure_are_sound_and_certified(tmp_path: Path, structure: str) -> None:
    for seed in range(100, 140):
        check_soundness(tmp_path / "c.json", seed, structure)


def rejected(path: Path, seed: int, kind: str, structure: str) -> bool:
    """Tamper with one certificate until rejection is the right answer; then it must be rejected.

    False where no tampering of this kind is wrong: a limit without a price may be raised.
    """
    rng = np.random.default_rng(seed)
    data, arrays = load(path)
    for _ in range(200):
        changed, moved = copy.deepcopy(data), {k: a.copy() for k, a in arrays.items()}
        if KINDS[kind](rng, changed, moved):
            break
    else:
        return False
    for signed in (True, False):
        store(path.with_name("tampered.json"), changed, moved, signed=signed)
        with pytest.raises(Rejected):
            certify(path.with_name("tampered.json"))
    return True


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for structure in (*TAMPERED, "blocks"):
        written(folder / f"{structure}.json", 3, structure)
        certify(folder / f"{structure}.json")
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tampered_certificates_are_rejected(honest: Path, kind: str) -> None:
    for k, structure in enumerate(("blocks",) if "need" in kind else TAMPERED):
        path = honest / f"{structure}.json"
        for seed in range(2):
            assert rejected(path, 10 * k + seed, kind, structure)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_tampered_certificates_are_rejected(tmp_path: Path) -> None:
    count = 0
    for structure, seed in itertools.product(sorted(STRUCTURES), range(3)):
        path = tmp_path / f"{structure}.json"
        written(path, 50 + seed, structure)
        certify(path)
        for (k, kind), again in itertools.product(enumerate(sorted(KINDS)), range(2)):
            count += rejected(path, 1000 * seed + 10 * k + again, kind, structure)
    assert count >= 1000, count


def test_damaged_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path, 0, "chain")
    beside = path.with_name("c.arrays.safetensors")
    texts = {path: path.read_bytes(), beside: beside.read_bytes()}
    rng = np.random.default_rng(0)
    for file, content in texts.items():
        for k in range(20):
            cut = content[: int(rng.integers(len(content)))]
            flipped = bytearray(content)
            flipped[int(rng.integers(len(content) - 1))] ^= 1 << int(rng.integers(8))
            file.write_bytes(cut if k % 2 else bytes(flipped))
            # A flipped bit in white space changes nothing that is said.
            if k % 2 or file == beside or json.loads(texts[path]) != _parsed(bytes(flipped)):
                with pytest.raises(Rejected):
                    certify(path)
        file.write_bytes(content)
    beside.unlink()
    with pytest.raises(Rejected, match="damaged"):
        certify(path)
    with pytest.raises(Rejected):
        certify(tmp_path / "none.json")
    for text in ("", "[]", "{}", "null", '"x"', '{"format": "qcqp-prune certificate", "schema": 1}'):
        path.write_text(text)
        with pytest.raises(Rejected):
            certify(path)


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_hints_decide_speed_only(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path, 1, "concat")
    data, arrays = load(path)
    before = certify(path)
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(40):
        changed = copy.deepcopy(data)
        for key in ("groups", "counts"):
            rng.shuffle(changed["hints"][key])
        store(path, changed, arrays)
        try:
            verdict = certify(path)
        except Rejected:
            continue  # a sum cannot be looked up in every order
        accepted += 1
        assert verdict.bound == pytest.approx(before.bound, rel=1e-10)
    assert accepted >= 5


def restricted(program: Program, counts: tuple[int, ...]) -> Program:
    return replace(program, groups=(replace(program.groups[0], counts=counts), *program.groups[1:]))


def best_proof(program: Program, x: np.ndarray) -> Proof:
    relaxation = Relaxation(program, x.astype(float), 0)
    steps = itertools.islice(relaxation.steps(lambda: False), 15)
    return proof_of(relaxation, min(steps, key=lambda step: step.bound))


def test_proofs_by_cases(tmp_path: Path) -> None:
    """A branching proves the larger bound of its cases; a case that proves the other side only is no proof."""
    problem = random_problem(2, "chain")
    program, best = Program.from_problem(problem), exhaustive(problem)
    x = best.mask[program.units]
    counts = program.groups[0].counts
    middle = counts[len(counts) // 2 - 1]
    sides = (tuple(n for n in counts if n <= middle), tuple(n for n in counts if n > middle))
    low, high = (best_proof(restricted(program, side), x) for side in sides)
    tree = Branching(0, middle, low, high)
    assert tree.bound == max(low.bound, high.bound)
    path = tmp_path / "c.json"
    Certificate(problem, x, best.objective, tree.bound, tree).write(path)
    verdict = certify(path)
    assert best.objective <= verdict.bound <= tree.bound
    for wrong in (Branching(0, middle, high, low), Branching(0, middle, low, low), low, high):
        values = {"low": low.bound, "high": high.bound}
        claim = min(values.values()) if wrong in (low, high) else tree.bound
        Certificate(problem, x, best.objective, min(claim, best.objective - 1e-3), wrong).write(path)
        with pytest.raises(Rejected):
            certify(path)


@pytest.mark.parametrize("structure", sorted(LINKED))
def test_prices_of_links(tmp_path: Path, structure: str) -> None:
    """Against the definition, on all points, for random prices; and a mask that breaks a link."""
    problem = random_problem(4, structure)
    program, best = Program.from_problem(problem), exhaustive(problem)
    unlinked = replace(program, links=type(program.links).none())
    plain = best_proof(unlinked, best.mask[program.units])
    rng = np.random.default_rng(0)
    prices = rng.uniform(0, 0.2, len(program.links) + len(program.links.heads))
    path = tmp_path / "c.json"
    certificate = Certificate(
        problem, best.mask[program.units], best.objective, 1e9, replace(plain, link_prices=prices)
    )
    certificate.write(path)
    proved = Brute(*load(path)).bound()
    assert proved >= best.objective
    verdict = certify(path)
    assert proved <= verdict.bound <= proved + 1e-9
    replace(certificate, bound=proved - 1e-6).write(path)
    with pytest.raises(Rejected, match="not the claimed"):
        certify(path)
    replace(certificate, proof=replace(plain, link_prices=-prices)).write(path)
    with pytest.raises(Rejected, match="price of links"):
        certify(path)
    certificate.write(path)
    data, arrays = load(path)
    arrays["mask"][program.links.heads] = 1 - arrays["mask"][program.links.heads]
    store(path, data, arrays)
    with pytest.raises(Rejected):
        certify(path)


def test_a_realistic_chain(tmp_path: Path) -> None:
    report = qp.solve(chain_problem("resnet20"), "decomposition", options=qp.SolveOptions(work_limit=25))
    report.write_certificate(tmp_path / "c.json")
    verdict = certify(tmp_path / "c.json")
    assert verdict.gap == report.gap
    assert verdict.gap is not None
    assert verdict.gap < 0.01


def test_checker_is_one_file_that_runs_alone(tmp_path: Path) -> None:
    written(tmp_path / "c.json", 0, "ties")
    alone = tmp_path / "checker.py"
    alone.write_text(Path(checker.__file__).read_text())
    code = """
import runpy, sys
alone, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(alone, run_name="__main__")
except SystemExit as left:
    assert not [m for m in sys.modules if m.startswith("qcqp")]
    sys.exit(left.code)
"""
    good = subprocess.run(
        [sys.executable, "-c", code, str(alone), str(tmp_path / "c.json")], capture_output=True, text=True
    )
    assert (good.returncode, "ACCEPTED" in good.stdout) == (0, True), good.stderr
    data, arrays = load(tmp_path / "c.json")
    data["claim"]["bound"] -= 1e-3
    store(tmp_path / "c.json", data, arrays)
    bad = runpy.run_path(str(alone))["main"]([str(tmp_path / "c.json")])
    assert bad == 1


def test_what_problem_it_speaks_of(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path, 0, "chain")
    problem = random_problem(0, "chain")
    assert differences(path, problem) == []
    assert stored_limits(path) == {"macs": problem.budgeted[0].limit}
    other = replace(
        problem, rows=(replace(problem.rows[0], limit=problem.rows[0].limit + 1), *problem.rows[1:])
    )
    assert differences(path, other) == ["constraints"]
    scores = replace(problem.objective, unary=problem.objective.unary + 1e-9)
    assert differences(path, replace(problem, objective=scores)) == ["linear"]
    assert differences(path, random_problem(1, "chain"))


def test_a_report_without_multipliers_has_no_certificate(tmp_path: Path) -> None:
    problem = random_problem(0, "chain")
    searched = qp.solve(problem, "block_coordinate")
    assert searched.certificate is None
    with pytest.raises(qp.NoCertificateError, match="no bound was proved"):
        searched.write_certificate(tmp_path / "c.json")
    exact = qp.solve(problem, "highs", gap_limit=0.0)
    assert exact.certificate is None
    with pytest.raises(qp.NoCertificateError, match="cannot write down"):
        exact.write_certificate(tmp_path / "c.json")
    proved = qp.solve(problem, "decomposition", options=qp.SolveOptions(work_limit=3))
    assert proved.certificate is not None
    # A report read from a file has lost it.
    assert qp.SolveReport.from_json(json.loads(json.dumps(proved.to_json()))).certificate is None
