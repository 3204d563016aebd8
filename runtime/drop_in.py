"""What the drop-ins for diffusers and the official repository share: experts, and calls of several.

An engine takes one video a call; the pipelines' models take several.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import load

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"


def open_experts(bundle: str | Path, **load_options: Any) -> dict[str, Denoiser]:
    """Open the engine of a bundle once, and return a denoiser for each expert.

    A model without experts has the one key "". A pipeline names the expert of every step itself,
    so each denoiser serves all timesteps. load_options are those of `load`, whose errors these are.
    """
    opened = load(bundle, **load_options)
    sampling = replace(opened.sampling, boundary=None)
    record = replace(opened.record, sampling=sampling)
    return {
        expert: Denoiser(record, {expert: engine}, opened.array)
        for expert, engine in opened.engines.items()
    }


def engine_device(denoiser: Denoiser) -> torch.device:
    """The kind of device that the engine runs on."""
    return torch.device(denoiser.record.target["device"])


def velocity_of_one(
    denoiser: Denoiser, *, latent: Tensor, timestep: np.ndarray, **inputs: Any
) -> Tensor:
    """The velocity [1, C, F, h, w] of one video in fp32; timestep is a scalar or [L], by token."""
    times = per_frame(timestep, denoiser.geometry)
    # Pipelines may call under autocast, which would round what the engine keeps in fp32.
    with torch.autocast(latent.device.type, enabled=False):
        velocity: Tensor = denoiser(latent=latent, timestep=times, **inputs)
    return velocity


def per_frame(timestep: np.ndarray, geometry: Geometry) -> np.ndarray:
    """One timestep for each latent frame, [F], of one for each token, [L]; [1] where all are equal.

    Tokens are in the order of the patch embedding: by frame, row, column. What has another length
    is returned as it is, for the denoiser to accept or refuse.
    Raises WanExportError when the tokens of one frame have different timesteps.
    """
    frames, rows, columns = geometry.grid
    if timestep.shape != (frames * rows * columns,):
        return timestep
    by_frame = timestep.reshape(frames, rows * columns)
    differing = (by_frame != by_frame[:, :1]).any(axis=1)
    if differing.any():
        raise WanExportError(
            f"timestep differs among the tokens of latent frame {int(differing.argmax())}: "
            f"the engine takes one for each frame, use the same for all of its tokens"
        )
    values = by_frame[:, 0]
    return values[:1] if (values == values[0]).all() else values


def images_by_video(name: str, images: Tensor, videos: int) -> Tensor:
    """CLIP features [n * videos, T, D], each video's n together, as [videos, n * T, D].

    Raises WanExportError when they cannot be shared out evenly.
    """
    if images.ndim != 3 or images.shape[0] == 0 or images.shape[0] % videos:
        raise WanExportError(
            f"{name} has shape {list(images.shape)} for {videos} videos: "
            f"expected [n * {videos}, tokens, width], as many images for each"
        )
    return images.reshape(videos, -1, images.shape[2])


def check_count(name: str, given: int, videos: int) -> None:
    """Raise WanExportError when there is not one for each video."""
    if given != videos or videos == 0:
        raise WanExportError(f"{name} has {given} entries for {videos} videos: pass one for each")
