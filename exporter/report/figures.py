"""How a report writes figures."""

Figure = float | None


def scientific(value: Figure) -> str:
    """An error, or a dash where there is none."""
    return "-" if value is None else f"{value:.2g}" if value >= 0.01 else f"{value:.1e}"


def seconds(value: Figure) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value * 1e6:.3g} us"


def share(value: Figure) -> str:
    """A part of 1 in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def count(value: Figure, unit: str) -> str:
    """A count in a unit with a prefix, as TFLOP/s or GB."""
    if value is None:
        return "-"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def number(value: Figure) -> str:
    """A plain count, of what happens in a step."""
    return "-" if value is None else f"{value:.5g}"
