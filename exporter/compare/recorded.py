"""Recorded tensors for `compare`: inputs of a loop, inputs of single calls, and velocities.

A file of calls stacks each input of the engine along the first dimension, in the place of its
batch of one: latent [N, C, F, h, w], text [N, n, D] with as many rows as the prompts have. Numbers
are [N], or [N, F] where the engine takes F of them. What all calls share may have a first dimension
of 1. The velocities are `velocity` [N, C, F, h, w].
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.denoiser import pad_rows
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.program import Input, TensorSpec

_LATENT, _TEXT, _VELOCITY = "latent", "text", "velocity"
_OF_STEPS = (_LATENT, "timestep")  # inputs of the engine that the loop gives it
_OF_LOOPS = ("negative", "first_frame", "noise")  # what `sample` takes beside the engine's inputs


def sample_names(inputs: Iterable[str]) -> tuple[str, ...]:
    """What `sample` takes of arrays for an engine of these inputs, text first."""
    others = (name for name in inputs if name not in (*_OF_STEPS, _TEXT))
    return _TEXT, *others, *_OF_LOOPS


def read_sample_inputs(path: Path, inputs: Iterable[str]) -> dict[str, np.ndarray]:
    """Inputs of `sample` for an engine of these inputs: text, and of the others what the file has.

    Raises BadRequest when there is no text, or something else, and for a file of single calls.
    """
    arrays, names = load_arrays(path), sample_names(inputs)
    if arrays.keys() - set(names) or _TEXT not in arrays:
        calls = "; single calls go to compare --calls" if _LATENT in arrays else ""
        raise BadRequest(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected text, and of "
            f"{', '.join(names[1:])} what applies{calls}"
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


def read_calls(path: Path, inputs: Mapping[str, Input]) -> list[dict[str, np.ndarray]]:
    """Inputs of every recorded call, as a denoiser takes them.

    Raises BadRequest, naming each of them, when inputs are missing, unexpected or misshapen, and
    for a file without latents, such as the inputs of a loop.
    """
    arrays = load_arrays(path)
    if _LATENT not in arrays:
        raise BadRequest(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected recorded calls, with "
            f"{', '.join(inputs)}; the inputs of a loop go to --inputs"
        )
    for name in inputs.keys() & arrays.keys():
        if inputs[name].draw == "rows":
            arrays[name] = pad_rows(arrays[name], inputs[name].shape, name=name)
    number = len(arrays[_LATENT]) if arrays[_LATENT].ndim else 0
    problems = [] if number else ["no call"]
    problems += [f"{name} missing" for name in inputs if name not in arrays]
    problems += [f"{name} not expected" for name in arrays if name not in inputs]
    for name in inputs.keys() & arrays.keys():
        shape, parts = arrays[name].shape, _parts(inputs[name])
        if not shape or shape[0] not in (1, number) or shape[1:] not in parts:
            problems.append(f"{name} is {list(shape)}, expected {[number, *parts[-1]]}")
    if problems:
        raise BadRequest(f"{path} does not fit the engine: {'; '.join(sorted(problems))}")
    return [
        {name: _part(array, inputs[name], i % len(array)) for name, array in arrays.items()}
        for i in range(number)
    ]


def _parts(spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
    """What shapes one call's part of a stacked input may have: numbers may be one for all."""
    if len(spec.shape) == 1:
        return (), spec.shape
    return (spec.shape[1:],) if spec.shape[0] == 1 else (spec.shape,)


def _part(stacked: np.ndarray, spec: TensorSpec, index: int) -> np.ndarray:
    """One call's input: a batch of one, or what is stacked whole."""
    is_whole = stacked.ndim > len(spec.shape)
    part: np.ndarray = stacked[index] if is_whole else stacked[index : index + 1]
    return part


def read_velocities(path: Path, number: int, spec: TensorSpec) -> list[np.ndarray]:
    """The recorded velocity of every call. Raises BadRequest when they do not fit the calls."""
    arrays = load_arrays(path)
    expected = (number, *spec.shape[1:])
    if list(arrays) != [_VELOCITY] or arrays[_VELOCITY].shape != expected:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise BadRequest(
            f"{path} holds {found or 'nothing'}: expected {_VELOCITY} {list(expected)}, "
            f"one for each recorded call"
        )
    return list(arrays[_VELOCITY][:, None])
