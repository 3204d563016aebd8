"""How a run samples, as `sample` and a pipeline's requests are told it."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypedDict


class SettingsKeywords(TypedDict, total=False):
    """The fields of `Settings`, as keywords of what takes them one by one."""

    steps: int | None
    shift: float | None
    guidance: float | tuple[float, float] | None
    solver: str | None
    timesteps: Sequence[float] | None
    recipe: str | None


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; None is the denoiser's own default.

    guidance is a number or Wan's (low noise, high noise) pair. timesteps are the explicit ones of a
    distilled model. recipe names settings of `recipes.RECIPES`, which the others replace. The
    numbers of a list, array or iterator are kept, which its owner may change or use up. Nothing is
    refused here: `sample.make_plan` does that.
    """

    steps: int | None = None
    shift: float | None = None
    guidance: float | tuple[float, float] | None = None
    solver: str | None = None
    timesteps: Sequence[float] | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        for name in ("guidance", "timesteps"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                with suppress(TypeError):  # an array without dimensions is a number
                    object.__setattr__(self, name, tuple(value))
