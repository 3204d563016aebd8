"""How fast a machine is at best, and the least time that some work then takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """The best rates measured of matrix products, in FLOP/s, and of copies, in bytes/s."""

    flops: float
    bytes: float

    def floor(self, flops: int | None, moved: int | None) -> float | None:
        """The seconds that FLOPs, or bytes, take at least; None where both are unknown."""
        if flops is not None:
            return flops / self.flops
        return None if moved is None else moved / self.bytes


def rates_from(stated: Any) -> Rates | None:
    """The rates that a digest of ours left in a trace; None of a trace of another program."""
    if not isinstance(stated, Mapping):
        return None
    flops, moved = stated.get("flops"), stated.get("bytes")
    good = all(isinstance(rate, int | float) and rate > 0 for rate in (flops, moved))
    return Rates(float(flops), float(moved)) if good and flops and moved else None
