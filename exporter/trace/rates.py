"""How fast a machine is at best, and the least time that some work then takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Rates:
    """The best rates measured of matrix products, in FLOP/s, and of copies, in bytes/s.

    `dtype` is the precision of the products, `fp32`, `bf16` or `fp16`. Both are None where products
    have a precision that is not measured.
    """

    flops: float | None
    bytes: float
    dtype: str | None

    def floor(self, flops: float | None, moved: float | None) -> float | None:
        """The seconds that FLOPs, or bytes, take at least; None where both are unknown."""
        if flops is not None:
            return flops / self.flops if self.flops else None
        return None if moved is None else moved / self.bytes


def rates_from(stated: Any) -> Rates | None:
    """The rates that a profile of ours left in a trace; None of a trace of another program."""
    if not isinstance(stated, Mapping):
        return None
    flops, moved, dtype = (stated.get(name) for name in ("flops", "bytes", "dtype"))
    if not _is_rate(moved) or not (flops is None or _is_rate(flops)):
        return None
    return Rates(flops, moved, dtype if isinstance(dtype, str) else None)


def _is_rate(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and 1 <= value < float("inf")
