"""What a pipeline is asked for, and what it gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np

from wanexport.runtime.bundle.durable import check_writable
from wanexport.runtime.errors import BadRequest, refuse_empty
from wanexport.runtime.parts.picture_reading import Picture, own_picture
from wanexport.runtime.sample import Step
from wanexport.runtime.serving.video import check_video
from wanexport.runtime.settings import Settings, SettingsKeywords

STAGES = ("text", "image", "sampling", "decode")
OnStep = Callable[[Step, int], object]  # a finished step, and how many there are


@dataclass(frozen=True, eq=False)
class Generation:
    """What one request and seed gave.

    latent [1, C, f, h, w] is fp32, before the VAE; video [F, H, W, 3] is uint8, None where it was
    not decoded or went to a file, for fps frames a second, the model's own rate. negative is None
    where no step was guided. seconds are of each stage; those that several seeds share are the
    first one's, and writing a file is part of decoding.
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


class _OtherKeywords(TypedDict, total=False):
    """The keywords of a request that it keeps as they are."""

    negative: str | None
    weights: str | None
    decode: bool
    output: str | Path | None
    on_step: OnStep | None


class RequestKeywords(_OtherKeywords, SettingsKeywords, total=False):
    """The keywords of every request, but for its seeds; `Pipeline.generate` says what they are."""

    image: Picture | None
    last_image: Picture | None


@dataclass(frozen=True, eq=False)
class Request:
    """What a waiting job holds: names, numbers, and the pixels of pictures that are no files."""

    prompt: str
    seeds: tuple[int, ...]
    settings: Settings
    negative: str | None = None
    image: str | Path | bytes | np.ndarray | None = None
    last_image: str | Path | bytes | np.ndarray | None = None
    weights: str | None = None
    decode: bool = True
    output: str | Path | None = None
    on_step: OnStep | None = None


def make_request(
    prompt: str,
    seeds: tuple[int, ...],
    *,
    steps: int | None = None,
    shift: float | None = None,
    guidance: float | tuple[float, float] | None = None,
    solver: str | None = None,
    timesteps: Sequence[float] | None = None,
    recipe: str | None = None,
    image: Picture | None = None,
    last_image: Picture | None = None,
    **others: Unpack[_OtherKeywords],
) -> Request:
    """The request that keywords make, which holds nothing that its caller may change.

    Raises BadRequest for an image that is neither a path nor bytes, and cannot be read.
    """
    return Request(
        prompt,
        seeds,
        Settings(steps, shift, guidance, solver, timesteps, recipe),
        image=own_picture(image, "image"),
        last_image=own_picture(last_image, "last_image"),
        **others,
    )


def check_request(request: Request) -> None:
    """Raise BadRequest for a prompt, path, name of weights, or seed that is none, and for an output
    that cannot be written."""
    check_texts(prompt=request.prompt, negative=request.negative, weights=request.weights)
    given = {name: getattr(request, name) for name in ("image", "last_image", "weights")}
    refuse_empty(**{name: value for name, value in given.items() if isinstance(value, str)})
    for seed in request.seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
            raise BadRequest(f"seed is {seed!r:.40}: expected a whole number of 0 or more")
    if request.output is not None:
        _check_output(request.output, request)


def _check_output(output: str | Path, request: Request) -> None:
    path = check_video(output)
    if not request.decode:
        raise BadRequest(f"{path} takes the decoded video: leave decode=False out, or output")
    if len(request.seeds) != 1:
        raise BadRequest(
            f"{path} takes one video, not those of {len(request.seeds)} seeds: make a request of "
            f"each, or leave output out"
        )
    try:
        check_writable(path)
    except OSError as error:
        raise BadRequest(
            f"cannot write {path} ({error.strerror}): name a file in an existing folder"
        ) from error


def check_texts(prompt: object, **others: object) -> None:
    """Raise BadRequest for a prompt that is no text, and for another that is neither text nor
    None."""
    for name, value in {"prompt": prompt, **others}.items():
        if not isinstance(value, str) and (name == "prompt" or value is not None):
            raise BadRequest(f"{name} is {value!r:.40}: expected text")
