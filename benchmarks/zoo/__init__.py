"""Networks for the compatibility matrix, by source. Each source is a module with a function ``cases``.

Nothing heavy is imported before a source is asked for, so that a process holds only what it measures.
"""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase

from benchmarks.zoo.case import Case

SOURCES = {
    "torchvision": "benchmarks.zoo.torchvision:classification",
    "segmentation": "benchmarks.zoo.torchvision:segmentation",
    "detection": "benchmarks.zoo.torchvision:detection",
    "timm": "benchmarks.zoo.timm:cases",
    "transformers": "benchmarks.zoo.transformers:cases",
}


def cases(source: str, globs: tuple[str, ...] = ("*",)) -> list[Case]:
    """The cases of a source whose name matches one of the globs, in the source's order."""
    module, _, name = SOURCES[source].partition(":")
    found: list[Case] = getattr(importlib.import_module(module), name)()
    return [case for case in found if any(fnmatchcase(case.name, glob) for glob in globs)]


def case(source: str, name: str) -> Case:
    """One case by its name."""
    return next(case for case in cases(source) if case.name == name)
