"""What a pipeline is asked for, and what it gives."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.errors import WanExportError, refuse_empty
from wanexport.runtime.sample import Step

STAGES = ("text", "image", "sampling", "decode")
OnStep = Callable[[Step, int], None]  # a finished step, and how many there are


@dataclass(frozen=True, eq=False)
class Generation:
    """What one request and seed gave.

    latent [1, C, f, h, w] is fp32, before the VAE; video [F, H, W, 3] is uint8, None where it was
    not decoded, for fps frames a second, the model's own rate. negative is None where no step was
    guided. seconds are of each stage; those that several seeds share are the first one's.
    prompt_cached: whether the text encoder was spared the prompt. notes are for the user: what was
    done to an image.
    """

    prompt: str
    negative: str | None
    seed: int
    latent: np.ndarray
    video: np.ndarray | None
    fps: int
    solver: str
    timesteps: tuple[float, ...]
    guidance: tuple[float, ...]  # of each step
    seconds: dict[str, float]
    prompt_cached: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What a waiting job holds: names and numbers, no arrays."""

    prompt: str
    seeds: tuple[int, ...]
    negative: str | None = None
    image: str | Path | None = None
    last_image: str | Path | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | tuple[float, float] | None = None
    solver: str | None = None
    timesteps: Sequence[float] | None = None
    decode: bool = True
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        """Keep the numbers of a list, array or iterator, which its owner may change or use up."""
        for name in ("guidance", "timesteps"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                with suppress(TypeError):  # an array without dimensions is a number
                    object.__setattr__(self, name, tuple(value))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `sample`."""
        names = ("steps", "shift", "guidance", "solver", "timesteps")
        return {name: getattr(self, name) for name in names}


def check_request(request: Request) -> None:
    """Raise WanExportError for a prompt, path or seed that is none."""
    path = str | Path | None
    kinds = {"prompt": str, "negative": str | None, "image": path, "last_image": path}
    for name, kind in kinds.items():
        value = getattr(request, name)
        if not isinstance(value, kind):
            expected = "a path" if kind is path else "text"
            raise WanExportError(f"{name} is {value!r:.40}: expected {expected}")
    refuse_empty(image=request.image, last_image=request.last_image)
    for seed in request.seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
            raise WanExportError(f"seed is {seed!r:.40}: expected a whole number of 0 or more")
