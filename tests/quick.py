"""Which parameters of a test run in `make test`: the others are slow, for `make test-all`."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

# Plain Wan's families differ in two things: CLIP's tokens, which the first has, and a timestep for
# each token, which the second has.
QUICK_PRESETS = ("i2v-14b", "ti2v-5b")


def slow_but(values: Iterable[Any] | Mapping[str, Any], *quick: Any) -> list[Any]:
    """The values as parameters of a test, all but the quick ones slow.

    A quick one is named by its value, by the first of several values, by the name of a function, or
    by its key, which a mapping's values have as ids.

    Raises ValueError for a quick one that is none of the values.
    """
    keyed = values.items() if isinstance(values, Mapping) else ((None, value) for value in values)
    parameters, found = [], set[int]()
    for key, value in keyed:
        several = value if isinstance(value, tuple) else (value,)
        names = (key, value, several[0], getattr(several[0], "__name__", None))
        chosen = {place for place, one in enumerate(quick) if any(_same(one, n) for n in names)}
        found |= chosen
        parameters.append(pytest.param(*several, id=key, marks=() if chosen else pytest.mark.slow))
    if len(found) < len(quick):
        missing = [one for place, one in enumerate(quick) if place not in found]
        raise ValueError(f"{missing} is none of the parameters: name one that is there")
    return parameters


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))
