"""What a rewriting did: how often each rule fired, and why it did not where it nearly fits."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

STRIDED_WRITES = "strided_writes"  # slices written to a buffer -> stack and flatten, or cat
COMPLEX_PRODUCTS = "complex_products"  # a product of complex numbers -> four real ones
EQUAL_ROWS = "equal_rows"  # a product of one row, repeated -> of as few rows as round the same
RULES = (STRIDED_WRITES, COMPLEX_PRODUCTS, EQUAL_ROWS)


@dataclass(frozen=True)
class Left:
    """A place that a rule nearly fits: the node, where it comes from, and why it was left."""

    rule: str
    node: str
    reason: str
    place: str = ""


@dataclass(frozen=True)
class Rewriting:
    """How many places each rule rewrote, and those that it left."""

    counts: dict[str, int]
    left: tuple[Left, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Both as JSON takes them."""
        return {"counts": dict(self.counts), "left": [asdict(left) for left in self.left]}


def total(parts: Iterable[Rewriting], rules: Iterable[str] = RULES) -> Rewriting:
    """The sum of rewritings, with a count of every rule."""
    parts = list(parts)
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    left = tuple(left for part in parts for left in part.left)
    return Rewriting({rule: counts[rule] for rule in rules}, left)
