"""Importances by name, on the command line and in configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qcqp_prune.cli.arguments import nearest
from qcqp_prune.errors import ConfigError

Name = Literal[
    "calibrated",
    "magnitude",
    "batch_norm_scale",
    "geometric_median",
    "lamp",
    "random",
    "taylor",
    "fisher",
    "neuron_sensitivity",
    "activation",
    "output_change",
]
VARIANTS = {
    "magnitude": ("paper", "authors", "l2"),
    "taylor": ("weight", "gate"),
    "neuron_sensitivity": ("exact", "lower"),
    "activation": ("mean", "apoz", "std"),
    "output_change": ("raw", "centred"),
}
"""Of each importance that has some, the default first."""
NEED_DATA = ("calibrated", "taylor", "fisher", "neuron_sensitivity", "activation", "output_change")
BATCHES = 8
"""Of training data, unless a file says another number."""


@dataclass(frozen=True)
class ImportanceSection:
    """An importance by name, and what is made of it.

    Attributes:
        name: of the criterion.
        variant: one of its own, see ``VARIANTS``; the first where None.
        batches: of training data, for those that need data but ``calibrated``, which takes samples as it needs them;
            ``BATCHES`` where None.
        seed: of ``random``; 0 where None.
        normalise: what is brought to one scale; see ``qcqp_prune.Normalised``.
        concave: the power of ``qcqp_prune.Concave``, applied last; None without.

    Raises:
        ConfigError: the criterion has no such variant, a number is out of range, or the criterion takes none.
    """

    name: Name
    variant: str | None = None
    batches: int | None = None
    seed: int | None = None
    normalise: Literal["none", "layer", "group", "macs"] = "none"
    concave: float | None = None

    def __post_init__(self) -> None:
        known = VARIANTS.get(self.name, ())
        if self.variant is not None and self.variant not in known:
            listed = ", ".join(f"{self.name}:{v}" for v in known)
            raise ConfigError(
                f"no importance is called {self.name}:{self.variant}: "
                + (f"variants are {listed}" if known else "leave the variant out")
            )
        if self.batches is not None and (self.name not in NEED_DATA or self.name == "calibrated"):
            why = "takes samples as it needs them" if self.name == "calibrated" else "looks at no data"
            raise ConfigError(f"importance.batches is {self.batches}, and {self.name} {why}: leave it out")
        if self.seed is not None and self.name != "random":
            raise ConfigError(f"importance.seed is {self.seed}, and {self.name} draws nothing: leave it out")
        if self.batches is not None and self.batches < 1:
            raise ConfigError(f"importance.batches is {self.batches}: give at least 1")
        if self.concave is not None and not 0 <= self.concave <= 1:
            raise ConfigError(f"concave is {self.concave}: give a power from 0 (logarithm) to 1 (a sum)")

    @property
    def form(self) -> str:
        """The variant, named or not; empty where there are none."""
        return self.variant or VARIANTS.get(self.name, ("",))[0]


def parse_importance(
    text: str, normalise: Literal["none", "layer", "group", "macs"] = "none", concave: float | None = None
) -> ImportanceSection:
    """``"magnitude:l2"`` or ``"random:3"``, and what is made of it.

    Raises:
        ConfigError: there is no such importance.
    """
    name, _, rest = text.partition(":")
    if name not in get_args(Name):
        known = get_args(Name)
        raise ConfigError(
            f"no importance is called {name!r}: {nearest(name, known)}choose from {', '.join(known)}"
        )
    seed = None
    if name == "random" and rest:
        if not rest.isdecimal():
            raise ConfigError(f"{text!r} has no seed that can be read: write random:3")
        seed, rest = int(rest), ""
    return ImportanceSection(
        name=name,  # type: ignore[arg-type]
        variant=rest or None,
        seed=seed,
        normalise=normalise,
        concave=concave,
    )
