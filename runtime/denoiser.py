"""The callable that a sampling loop sees: checks its inputs, picks the expert, runs the engine."""

from collections.abc import Callable, Mapping
from dataclasses import astuple

import numpy as np

from wanexport.runtime.arrays import Array, count_not_finite, is_on_gpu, is_torch, like, to_numpy
from wanexport.runtime.bundle.manifest import EngineRecord, SamplingDefaults, TensorSpec
from wanexport.runtime.engines.engine import Engine
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import PATCH, TEMPORAL_STRIDE, Geometry
from wanexport.runtime.machine.memory import limit_bytes
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS


class Denoiser:
    """Velocity of a latent at a timestep, from one engine of a bundle.

    `engines` maps each expert to its engine; a model without experts has the one key "". `array`
    makes of a caller's array what the engine takes: fp32 in numpy, or a torch tensor on its device.
    """

    def __init__(
        self,
        record: EngineRecord,
        engines: Mapping[str, Engine],
        array: Callable[[Array], Array] | None = None,
    ) -> None:
        self.record = record
        self.engines = dict(engines)
        self.array = array or to_numpy

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every input the engine takes."""
        return self.record.inputs

    @property
    def geometry(self) -> Geometry:
        """The video geometry this engine was compiled for."""
        return self.record.geometry

    @property
    def sampling(self) -> SamplingDefaults:
        """The model's official sampling defaults at this geometry."""
        return self.record.sampling

    def __call__(
        self,
        *,
        latent: Array,
        timestep: Array | float,
        text: Array,
        condition: Array | None = None,
        image: Array | None = None,
    ) -> Array:
        """Return the velocity: shaped and placed like latent, in fp32.

        latent [1, C, F, h, w]; timestep a number or [1], for TI2V also [F]; text [n, 4096] or
        [1, n, 4096] with n <= 512, zero-padded to 512 here; condition and image as in `inputs`.
        Raises WanExportError, a ValueError, for a missing, unexpected or wrongly shaped input, for
        one with NaN or Inf, for a timestep outside 0 to 1000, and when the engine needs more memory
        than there can be. Tensors on a GPU are not searched for NaN, and nothing waits for them; a
        timestep there is waited for.
        """
        self._check_memory()
        given = {"latent": latent, "text": text, "condition": condition, "image": image}
        arrays = {name: _fp32(value) for name, value in given.items() if value is not None}
        times = self._broadcast(to_numpy(timestep))
        if "text" in arrays:
            arrays["text"] = pad_text(arrays["text"], self.inputs["text"].shape)
        self._check({**arrays, "timestep": times})
        if not ((times >= 0) & (times <= NUM_TRAIN_TIMESTEPS)).all():
            raise WanExportError(
                f"timestep is from {times.min():g} to {times.max():g}: expected from 0 to "
                f"{NUM_TRAIN_TIMESTEPS}, a sigma times {NUM_TRAIN_TIMESTEPS}"
            )
        on_device = {name: self.array(value) for name, value in arrays.items()}
        on_device["timestep"] = self.array(times)
        velocity = self.engines[self.expert(float(times.max()))](on_device)
        if tuple(velocity.shape) != self.record.output.shape:
            raise WanExportError(
                f"engine {self.record.name} gave {list(velocity.shape)}, its record says "
                f"{list(self.record.output.shape)}: run wanexport build again"
            )
        return like(velocity, latent)

    @property
    def switch_seconds(self) -> list[float]:
        """How long each replacement of one expert's weights by the other's took."""
        held = {id(w): w for e in self.engines.values() if (w := getattr(e, "weights", None))}
        return [seconds for weights in held.values() for seconds in weights.switches]

    def expert(self, timestep: float) -> str:
        """The expert that serves this timestep; empty where there is only one model."""
        if self.sampling.boundary is None:
            return next(iter(self.engines))
        high = timestep >= self.sampling.boundary * NUM_TRAIN_TIMESTEPS
        return "high_noise" if high else "low_noise"

    def _broadcast(self, timestep: np.ndarray) -> np.ndarray:
        shape = self.inputs["timestep"].shape
        if timestep.size == 1:
            return np.full(shape, timestep.item(), np.float32)
        return timestep

    def _check(self, arrays: Mapping[str, Array]) -> None:
        missing = [name for name in self.inputs if name not in arrays]
        extra = [name for name in arrays if name not in self.inputs]
        if missing or extra:
            raise WanExportError(
                f"engine {self.record.name} takes {', '.join(self.inputs)}: "
                + "; ".join(
                    f"{', '.join(names)} {what}"
                    for names, what in ((missing, "missing"), (extra, "not expected"))
                    if names
                )
            )
        for name, spec in self.inputs.items():
            shape = tuple(arrays[name].shape)
            if shape != spec.shape:
                raise WanExportError(
                    f"{name} has shape {list(shape)}, engine {self.record.name} takes "
                    f"{list(spec.shape)}{self._rebuild_hint(name, shape)}"
                )
            if bad := count_not_finite(arrays[name]):
                raise WanExportError(
                    f"{name} has {bad} values that are NaN or Inf: expected finite ones; "
                    f"look at what made it"
                )

    def _check_memory(self) -> None:
        """Refuse what the system would kill: on a CPU ONNX Runtime holds the scores twice."""
        needed = 2 * self.record.build.get("attention_score_bytes", 0)
        on_cpu = self.record.backend == "onnx" and self.record.target.get("device") != "cuda"
        if on_cpu and needed > limit_bytes():
            raise WanExportError(
                f"engine {self.record.name} needs {needed / 1e9:.0f} GB for attention in ONNX "
                f"Runtime on a CPU, of {limit_bytes() / 1e9:.0f} GB here: "
                f"build one of a smaller --resolution or fewer --frames"
            )

    def _rebuild_hint(self, name: str, shape: tuple[int, ...]) -> str:
        """For a latent of another geometry: the nearest legal build options."""
        if name not in ("latent", "condition") or len(shape) != 5 or 0 in shape:
            return ""
        side = PATCH * self.geometry.spatial_stride
        height, width = (max(1, round(n / PATCH)) * side for n in shape[3:])
        frames = (shape[2] - 1) * TEMPORAL_STRIDE + 1
        if (height, width, frames) == astuple(self.geometry)[:3]:
            return ""
        return f": build an engine with --resolution {height}x{width} --frames {frames}"


def _fp32(value: Array) -> Array:
    """A tensor on a GPU as it is, anything else as an fp32 numpy array."""
    return value if is_on_gpu(value) else to_numpy(value)


def check_rows(**texts: Array | None) -> None:
    """Raise WanExportError, naming them, for text embeddings [n, D] or [1, n, D] with n = 0."""
    for name, text in texts.items():
        shape: tuple[int, ...] = tuple(getattr(text, "shape", ()))
        if len(shape) > 1 and shape[-2] == 0:
            raise WanExportError(
                f"{name} has shape {list(shape)}, no row: expected one for each token of a prompt, "
                f"an empty prompt has one too"
            )


def pad_text(text: Array, shape: tuple[int, ...]) -> Array:
    """Zero-pad text embeddings [n, D] or [1, n, D] to [1, 512, D]: Wan attends to the zero rows.

    Raises WanExportError when there are no rows, or more than the model takes.
    """
    check_rows(text=text)
    text = text[None] if text.ndim == 2 else text
    if text.ndim == 3 and text.shape[1] > shape[1]:
        raise WanExportError(
            f"text has {text.shape[1]} rows, the model takes at most {shape[1]}: "
            f"truncate the prompt"
        )
    if text.ndim != 3 or text.shape[1] == shape[1]:
        return text
    missing = shape[1] - text.shape[1]
    if is_torch(text):
        import torch

        return torch.nn.functional.pad(text, (0, 0, 0, missing))
    return np.pad(text, ((0, 0), (0, missing), (0, 0)))
