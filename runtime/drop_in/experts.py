"""What the drop-ins for diffusers and the official repository share: experts, and calls of several.

An engine takes one video a call; the pipelines' models take several.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from wanexport.runtime.arrays import Array, is_on_gpu, to_numpy
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import EngineKeywords
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import load
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"


class EngineModule:
    """An engine asked as scripts ask a pipeline's model, a torch.nn.Module.

    What places a model, or makes it ready to run, finds it placed and ready; what it has not raises
    an AttributeError of one line. Inputs and outputs are fp32, whatever the engine's precision.
    Raises BadRequest for the engine of a causal model.
    """

    training = False

    def __init__(self, denoiser: Denoiser) -> None:
        if denoiser.geometry.chunk:
            raise BadRequest(
                f"engine {denoiser.record.name} makes a video chunk by chunk, and a pipeline of "
                f"other code asks for it whole: take denoiser.stream(), or an engine of a Wan that "
                f"is not causal"
            )
        self.denoiser = denoiser
        self.dtype = torch.float32
        self.device = engine_device(denoiser)
        self._last_time = 0.0
        self._looked_at: tuple[int, ...] = ()  # the shape of timesteps that were looked at

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a compiled model has no {name!r}: what changes the model, as a LoRA, comes before "
            f"wanexport build; for the rest use the pipeline's own model"
        )

    def to(self, *place: Any, **options: Any) -> Self:
        """Stay: an engine has the device and precision that it was built and opened for."""
        return self

    cuda = cpu = float = half = bfloat16 = to

    def eval(self) -> Self:
        """An engine is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Raise BadRequest unless mode is False."""
        return self._without_training(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raise BadRequest unless requires_grad is False."""
        return self._without_training(requires_grad)

    def _without_training(self, asked: bool) -> Self:
        if asked:
            raise BadRequest(
                "an engine has no gradients and cannot be trained: train the pipeline's own model"
            )
        return self

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """One empty tensor where the engine runs, which is what pipelines look for."""
        yield torch.empty(0, dtype=self.dtype, device=self.device)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[Any]:
        """That tensor, with a name."""
        for tensor in self.parameters():
            yield "engine", tensor

    def times(self, given: Array) -> Array:
        """The pipeline's timesteps [N] or [N, L], in fp32.

        Those on a GPU stay there, and the host does not wait for them, once a call with as many has
        shown that they are timesteps and those of a frame equal: no pipeline changes that.
        """
        if is_on_gpu(given) and tuple(given.shape) == self._looked_at and self._takes(given):
            return given.detach().float()
        return np.atleast_1d(to_numpy(given))

    def _takes(self, times: Tensor) -> bool:
        """Whether these are one for each video, or the engine takes one for each frame."""
        frames = self.denoiser.geometry.grid[0]
        return times.ndim == 1 or self.denoiser.inputs["timestep"].shape == (frames,)

    def check_times(self, name: str, times: Array) -> None:
        """Refuse sigmas, from 0 to 1, in the place of timesteps, from 0 to 1000.

        A run may end with one timestep below 1, to which it falls from a higher one.
        """
        if is_on_gpu(times):
            return
        time = times.max(initial=0)
        if 0 < time <= 1 and not (self._last_time > 1 or self._last_time == time):
            raise BadRequest(
                f"{name} is {time:g}: this is a sigma from 0 to 1; as timestep: "
                f"{NUM_TRAIN_TIMESTEPS * time:g}"
            )
        self._last_time = time

    def velocities(self, times: Array, inputs: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """The velocity [1, C, F, h, w] in fp32 of each video, which run one after the other.

        times [N] or [N, L], by token, and inputs have an entry for each video.
        """
        found = []
        for index, time in enumerate(times):
            own = {name: values[index] for name, values in inputs.items()}
            # Pipelines may call under autocast, which would round what the engine keeps in fp32.
            with torch.autocast(own["latent"].device.type, enabled=False):
                time = per_frame(time, self.denoiser.geometry)
                found.append(self.denoiser(timestep=time, **own))
        self._looked_at = tuple(times.shape)
        return found


def open_experts(bundle: str | Path, **load_options: Unpack[EngineKeywords]) -> dict[str, Denoiser]:
    """Open the engine of a bundle once, and return a denoiser for each expert.

    A model without experts has the one key "". A pipeline names the expert of every step itself,
    so each denoiser serves all timesteps. load_options are those of `load`, whose errors these are.
    """
    opened = load(bundle, **load_options)
    return {expert: opened.only(expert) for expert in opened.engines}


def engine_device(denoiser: Denoiser) -> torch.device:
    """The device that the engine runs on."""
    return torch.device(denoiser.device)


def per_frame(timestep: Array, geometry: Geometry) -> Array:
    """One timestep for each latent frame, [F], of one for each token, [L]; [1] where all are equal.

    Tokens are in the order of the patch embedding: by frame, row, column. What has another length
    is returned as it is, for the denoiser to accept or refuse. On a GPU they are not compared: a
    frame has that of its first token.
    Raises BadRequest when the tokens of one frame have different timesteps.
    """
    frames, rows, columns = geometry.grid
    if tuple(timestep.shape) != (frames * rows * columns,):
        return timestep
    by_frame = timestep.reshape(frames, rows * columns)
    if is_on_gpu(timestep):
        return by_frame[:, 0]
    differing = (by_frame != by_frame[:, :1]).any(axis=1)
    if differing.any():
        raise BadRequest(
            f"timestep differs among the tokens of latent frame {int(differing.argmax())}: "
            f"the engine takes one for each frame, use the same for all of its tokens"
        )
    values = by_frame[:, 0]
    return values[:1] if (values == values[0]).all() else values


def images_by_video(name: str, images: Tensor, videos: int) -> Tensor:
    """CLIP features [n * videos, T, D], each video's n together, as [videos, n * T, D].

    Raises BadRequest when they cannot be shared out evenly.
    """
    if images.ndim != 3 or images.shape[0] == 0 or images.shape[0] % videos:
        raise BadRequest(
            f"{name} has shape {list(images.shape)} for {videos} videos: "
            f"expected [n * {videos}, tokens, width], as many images for each"
        )
    return images.reshape(videos, -1, images.shape[2])


def one_for_each(name: str, given: Tensor, videos: int) -> Tensor:
    """The given entries, of which one alone serves every video.

    Raises BadRequest when there is another number of them.
    """
    if given.shape[0] == 1 < videos:
        return given.expand(videos, *given.shape[1:])
    if given.shape[0] != videos or videos == 0:
        raise BadRequest(
            f"{name} has {given.shape[0]} entries for {videos} videos: pass one for each, or one "
            f"for all"
        )
    return given


def check_count(name: str, given: int, videos: int) -> None:
    """Raise BadRequest when there is not one for each video."""
    if given != videos or videos == 0:
        raise BadRequest(f"{name} has {given} entries for {videos} videos: pass one for each")
