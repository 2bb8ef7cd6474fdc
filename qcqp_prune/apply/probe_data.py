"""A few output values of a network: plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Between machines and thread counts, sums are rounded in another order; another activation is far outside this.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "complex64": 1e-3}
_COARSE = 1e-1


@dataclass(frozen=True)
class Probe:
    """One output tensor.

    Attributes:
        shape, dtype: of the tensor.
        values: evenly spaced entries, None for those that are not finite.
    """

    shape: tuple[int, ...]
    dtype: str
    values: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Probe:
        """The inverse of ``to_json``."""
        return cls(tuple(data["shape"]), str(data["dtype"]), tuple(data["values"]))

    def agrees(self, other: Probe) -> bool:
        """Whether two networks gave the same, to rounding."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        scale = max((abs(v) for v in self.values if v is not None), default=0.0)
        slip = _TOLERANCE.get(self.dtype, _COARSE) * scale + 1e-12
        return all(
            (a is None) == (b is None) and (a is None or b is None or abs(a - b) <= slip)
            for a, b in zip(self.values, other.values, strict=True)
        )
