"""The callable that a sampling loop sees: checks its inputs, picks the expert, runs the engine."""

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import PATCH, TEMPORAL_STRIDE, Geometry
from wanexport.runtime.manifest import EngineRecord, SamplingDefaults, TensorSpec
from wanexport.runtime.memory import limit_bytes
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS

Array = Any  # a numpy array or a torch tensor
Engine = Callable[[Mapping[str, np.ndarray]], np.ndarray]


class Denoiser:
    """Velocity of a latent at a timestep, from one engine of a bundle.

    `engines` maps each expert to its engine; a model without experts has the one key "".
    """

    def __init__(self, record: EngineRecord, engines: Mapping[str, Engine]) -> None:
        self.record = record
        self.engines = dict(engines)

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
        one with NaN or Inf, and when the engine needs more memory than there can be.
        """
        self._check_memory()
        given = {"latent": latent, "text": text, "condition": condition, "image": image}
        arrays = {name: to_numpy(value) for name, value in given.items() if value is not None}
        arrays["timestep"] = self._broadcast(to_numpy(timestep))
        if "text" in arrays:
            arrays["text"] = pad_text(arrays["text"], self.inputs["text"].shape)
        self._check(arrays)
        velocity = self.engines[self.expert(float(arrays["timestep"].max()))](arrays)
        if velocity.shape != self.record.output.shape:
            raise WanExportError(
                f"engine {self.record.name} gave {list(velocity.shape)}, its record says "
                f"{list(self.record.output.shape)}: run wanexport build again"
            )
        return like(velocity, latent)

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

    def _check(self, arrays: Mapping[str, np.ndarray]) -> None:
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
            if arrays[name].shape != spec.shape:
                raise WanExportError(
                    f"{name} has shape {list(arrays[name].shape)}, engine {self.record.name} takes "
                    f"{list(spec.shape)}{self._rebuild_hint(name, arrays[name].shape)}"
                )
            if not np.isfinite(arrays[name]).all():
                bad = int((~np.isfinite(arrays[name])).sum())
                raise WanExportError(
                    f"{name} has {bad} values that are NaN or Inf: expected finite ones; "
                    f"look at what made it"
                )

    def _check_memory(self) -> None:
        """Refuse what the system would kill: ONNX Runtime holds the attention scores twice."""
        needed = 2 * self.record.build.get("attention_score_bytes", 0)
        if self.record.backend == "onnx" and needed > limit_bytes():
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


def is_torch(value: Any) -> bool:
    """Whether value is a torch tensor, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def to_numpy(value: Array) -> np.ndarray:
    """An fp32 numpy array of a number, an array or a torch tensor on any device.

    Raises WanExportError for anything else.
    """
    try:
        plain = value.detach().float().cpu().numpy() if is_torch(value) else value
        return np.ascontiguousarray(plain, np.float32)
    except (TypeError, ValueError, NotImplementedError) as error:  # the last of a meta tensor
        raise WanExportError(
            f"{type(value).__name__} is no array of numbers: pass numpy arrays or torch tensors"
        ) from error


def like(array: np.ndarray, model: Array) -> Array:
    """array as the kind that model is: numpy, or torch on model's device; always fp32."""
    if not is_torch(model):
        return array
    import torch

    return torch.from_numpy(array).to(model.device)


def pad_text(text: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Zero-pad text embeddings [n, D] or [1, n, D] to [1, 512, D]: Wan attends to the zero rows.

    Raises WanExportError when there are more rows than the model takes.
    """
    text = text[None] if text.ndim == 2 else text
    if text.ndim == 3 and text.shape[1] > shape[1]:
        raise WanExportError(
            f"text has {text.shape[1]} rows, the model takes at most {shape[1]}: "
            f"truncate the prompt"
        )
    if text.ndim != 3 or text.shape[1] == shape[1]:
        return text
    return np.pad(text, ((0, 0), (0, shape[1] - text.shape[1]), (0, 0)))
