"""How a caller names LoRAs and their strengths. It imports no PyTorch."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from wanexport.runtime.errors import BadRequest, printable

Given = str | Path | tuple[str | Path, float]  # FILE[:STRENGTH], a file, or a file and a strength
_NOISE = re.compile(r"(?<![a-z])(high|low)[^a-z]*noise")
Loras = Sequence[Given] | Mapping[str, Sequence[Given]]  # in order; a mapping is by expert


def parse_given(given: Given) -> tuple[Path, float]:
    """The file and the strength. Raises BadRequest as parse_lora does, and for what is neither."""
    if isinstance(given, str):
        return parse_lora(given)
    if isinstance(given, Path):
        return given, 1.0
    try:
        file, strength = given
        return Path(file), float(strength)
    except (TypeError, ValueError):
        raise BadRequest(
            f"{printable(given)} is no LoRA: expected FILE, FILE:STRENGTH or (FILE, STRENGTH)"
        ) from None


def parse_all(loras: Sequence[Given] | str | Path) -> list[tuple[Path, float]]:
    """The files and strengths of several LoRAs, or of one. Raises as parse_given does."""
    return [parse_given(one) for one in ([loras] if isinstance(loras, str | Path) else loras)]


def by_expert(loras: Loras, experts: Sequence[str]) -> dict[str, list[tuple[Path, float]]]:
    """The files and strengths of each expert, "" where there are none.

    Raises BadRequest for an expert that the model has not, and for a file named as of another.
    """
    names = experts or ("",)
    found = _by_expert(loras, names)
    for expert, files in found.items() if experts else ():
        for path, _ in files:
            if (named := expert_of(path)) not in ("", expert):
                raise BadRequest(
                    f"{printable(path)} is named as of {named} and given to {expert}: pass "
                    f"lora={{{named!r}: [...]}}"
                )
    return found


def _by_expert(loras: Loras, names: Sequence[str]) -> dict[str, list[tuple[Path, float]]]:
    if not isinstance(loras, Mapping):
        parsed = parse_all(loras)
        return {name: list(parsed) for name in names}
    if wrong := [name for name in loras if name not in names]:
        known = ", ".join(names) if any(names) else "a list, as the model has one expert"
        raise BadRequest(f"no expert {printable(wrong[0])!r} has a LoRA here: expected {known}")
    return {name: parse_all(loras.get(name, ())) for name in names}


def expert_of(file: Path) -> str:
    """The expert that a LoRA's name says by `high_noise` or `low-noise`; empty for none or both."""
    found = {match[1] for match in _NOISE.finditer(file.name.lower())}
    return f"{found.pop()}_noise" if len(found) == 1 else ""


def parse_lora(text: str) -> tuple[Path, float]:
    """A file and its strength from FILE[:STRENGTH]; without one it is 1.

    What follows the last colon is a strength when it is a number and no file has the whole text as
    its name. Raises BadRequest for an empty file or strength, and for NaN and infinity.
    """
    file, colon, last = text.rpartition(":")
    if not colon or os.path.exists(text):
        file, last = text, "1"
    try:
        strength = float(last)
    except ValueError:
        if last.strip():
            return Path(text), 1.0
        raise BadRequest(
            f"{printable(text)} ends in a colon: give a strength after it, or leave it out"
        ) from None
    if not file.strip():
        raise BadRequest(f"{printable(text)!r} names no LoRA file: expected FILE or FILE:STRENGTH")
    check_strength(text, strength)
    return Path(file), strength


def check_strength(of: object, strength: float) -> None:
    """Raise BadRequest for a strength that is no finite number."""
    if not math.isfinite(strength):
        raise BadRequest(
            f"{printable(of)} has the strength {strength}: expected a finite number, such as 0.8"
        )
