"""Recorded tensors for `compare`: inputs of a loop, inputs of single calls, and velocities.

A file of calls stacks them along the first dimension: latent [N, C, F, h, w], timestep [N] (TI2V
also [N, F], one for each latent frame), text [N, n, D], condition and image where the model takes
them; what all calls share may have a first dimension of 1. The velocities are `velocity`
[N, C, F, h, w].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.bundle.manifest import TensorSpec
from wanexport.runtime.bundle.tensorfile import load_arrays, read_header
from wanexport.runtime.denoiser import pad_text
from wanexport.runtime.errors import WanExportError

SAMPLE_INPUTS = ("text", "negative", "condition", "image", "first_frame", "noise")


def read_sample_inputs(path: Path) -> dict[str, np.ndarray]:
    """Inputs of `sample`: text, and of the others what the file has.

    Raises WanExportError when there is no text, or something else.
    """
    arrays = load_arrays(path)
    unknown = [name for name in arrays if name not in SAMPLE_INPUTS]
    if unknown or "text" not in arrays:
        raise WanExportError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected text, and of "
            f"{', '.join(SAMPLE_INPUTS[1:])} what applies"
        )
    return arrays


@dataclass(frozen=True)
class Loop:
    """A sampling loop: the inputs of `sample`, and its length."""

    inputs: Mapping[str, Any]
    steps: int
    recorded_dtype: None = None


@dataclass(frozen=True)
class Calls:
    """Single calls of a denoiser, and what was recorded for them: velocities of some precision."""

    inputs: Sequence[Mapping[str, np.ndarray]]
    velocities: Sequence[np.ndarray] = ()
    recorded_dtype: str | None = None


def read_calls(path: Path, specs: Mapping[str, TensorSpec]) -> list[dict[str, np.ndarray]]:
    """Inputs of every recorded call, as a denoiser takes them.

    Raises WanExportError, naming each of them, when inputs are missing, unexpected or misshapen.
    """
    arrays = load_arrays(path)
    if "text" in arrays:
        arrays["text"] = pad_text(arrays["text"], specs["text"].shape)
    number = len(arrays["latent"]) if arrays["latent"].ndim else 0
    problems = [] if number else ["no call"]
    problems += [f"{name} missing" for name in specs if name not in arrays]
    problems += [f"{name} not expected" for name in arrays if name not in specs]
    for name in specs.keys() & arrays.keys():
        shape, rows = arrays[name].shape, specs[name].shape
        rests = ((), rows) if name == "timestep" else (rows[1:],)
        if not shape or shape[0] not in (1, number) or shape[1:] not in rests:
            problems.append(f"{name} is {list(shape)}, expected {[number, *rests[-1]]}")
    if problems:
        raise WanExportError(f"{path} does not fit the engine: {'; '.join(sorted(problems))}")
    return [{name: _row(name, a, i % len(a)) for name, a in arrays.items()} for i in range(number)]


def _row(name: str, stacked: np.ndarray, index: int) -> np.ndarray:
    """One call's input: a batch of one, or its timesteps."""
    is_per_frame = name == "timestep" and stacked.ndim == 2
    row: np.ndarray = stacked[index] if is_per_frame else stacked[index : index + 1]
    return row


def read_velocities(path: Path, number: int, spec: TensorSpec) -> list[np.ndarray]:
    """The recorded velocity of every call. Raises WanExportError when they do not fit the calls."""
    arrays = load_arrays(path)
    expected = (number, *spec.shape[1:])
    if list(arrays) != ["velocity"] or arrays["velocity"].shape != expected:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise WanExportError(
            f"{path} holds {found or 'nothing'}: expected velocity {list(expected)}, "
            f"one for each recorded call"
        )
    return list(arrays["velocity"][:, None])


def is_of_calls(path: Path) -> bool:
    """Whether a file of inputs has those of single calls, rather than of a loop."""
    return "latent" in read_header(path)
