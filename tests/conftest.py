"""Where the tests find images and published weights; tests that lack them are skipped with a reason."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch._logging._internal import trace_log

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_sessionstart() -> None:
    """Exports allocate so many small objects that collecting them all the time takes a tenth of the tests' time."""
    gc.freeze()
    gc.set_threshold(200_000, 50, 50)
    # pytest listens to loggers that do not propagate, and PyTorch writes down all that it exports once somebody does.
    trace_log.propagate = True


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds `cifar-10-batches-bin`, `mnist` and `fashion_mnist`."""
    named = os.environ.get("QCQP_PRUNE_DATA")
    if named:
        return Path(named)
    cached = ROOT / ".cache" / "data"
    if cached.is_dir():
        return cached
    if not (SHARED / "unpack.py").is_file():
        pytest.skip(
            "set QCQP_PRUNE_DATA to the folder that holds cifar-10-batches-bin, mnist and fashion_mnist"
        )
    return _unpack(cached)


def _unpack(cached: Path) -> Path:
    """Unpack aside, then rename: parallel workers may both do so, and the first to finish wins."""
    cached.parent.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=cached.parent, prefix="data-"))
    try:
        subprocess.run([sys.executable, str(SHARED / "unpack.py"), str(aside)], check=True)
        try:
            aside.rename(cached)
        except OSError:
            if not cached.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return cached


@pytest.fixture(scope="session")
def pretrained_root() -> Path:
    """The folder that holds `resnet20-12fca82f.th` and its sisters."""
    root = Path(os.environ.get("QCQP_PRUNE_PRETRAINED") or SHARED / "pretrained")
    if not root.is_dir():
        pytest.skip("set QCQP_PRUNE_PRETRAINED to the folder that holds resnet20-12fca82f.th")
    return root
