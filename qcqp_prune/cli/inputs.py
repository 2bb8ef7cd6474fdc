"""Example inputs, as they are asked for on the command line and in configuration files."""

from __future__ import annotations

from dataclasses import dataclass

from qcqp_prune.errors import ConfigError


@dataclass(frozen=True)
class InputSection:
    """What the network is traced with.

    Attributes:
        shape: of its one input, batch first.
        dtype: of that.
        below: whole numbers are drawn below this one, such as the number of tokens.
        source: in place of a shape, ``package.module:callable`` or ``file.py:callable`` that returns example inputs: a
            tensor, a tuple of arguments, or a dict of keyword arguments.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    below: int = 10
    source: str | None = None

    def __post_init__(self) -> None:
        if bool(self.shape) == (self.source is not None):
            raise ConfigError(
                "the example input has a shape, such as 1,3,32,32, or a source, file.py:callable, that makes it: give "
                "one of the two"
            )
        if min(self.shape, default=1) < 1 or self.below < 1:
            raise ConfigError(
                "the example input has no positive shape, or is to be below 1: give positive numbers"
            )
