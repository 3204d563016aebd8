"""A bundle's engine in the place of `WanModel` in the official repositories' pipelines.

These are the classes WanT2V, WanI2V, WanFLF2V and WanTI2V of Wan-Video/Wan2.1 and Wan2.2. Nothing
of them is imported: what matters is which attributes hold their models, and how they call them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor

from wanexport.runtime.drop_in.experts import (
    HIGH_NOISE,
    LOW_NOISE,
    EngineModule,
    check_count,
    images_by_video,
    open_experts,
)
from wanexport.runtime.engines.engine import EngineKeywords
from wanexport.runtime.errors import BadRequest

_MODEL_OF_EXPERT = {"": "model", HIGH_NOISE: "high_noise_model", LOW_NOISE: "low_noise_model"}
_Pipeline = TypeVar("_Pipeline")


def patch(
    wan_pipeline: _Pipeline, bundle: str | Path, **load_options: Unpack[EngineKeywords]
) -> _Pipeline:
    """Replace the models of an official pipeline by the bundle's engine, and return the pipeline.

    The pipeline keeps its text encoder, VAE, schedule and choice of expert; its own models are
    moved to the CPU, lest they take the memory that the engine needs, and let go once the engine is
    open. load_options are those of `load`. Raises what `load` raises, and BadRequest when
    pipeline and bundle do not have the same number of models; the pipeline then keeps its own, on
    the CPU.
    """
    if getattr(wan_pipeline, "sp_size", 1) > 1:
        raise BadRequest(
            "the engine runs on one GPU: make the pipeline without sequence parallelism"
        )
    names = [name for name in _MODEL_OF_EXPERT.values() if hasattr(wan_pipeline, name)]
    for name in names:
        getattr(wan_pipeline, name).cpu()
    torch.cuda.empty_cache()  # an engine's memory need not come from PyTorch's cache
    models = {
        _MODEL_OF_EXPERT[expert]: CompiledWanModel(denoiser)
        for expert, denoiser in open_experts(bundle, **load_options).items()
    }
    if set(models) != set(names):
        raise BadRequest(
            f"{type(wan_pipeline).__name__} has {', '.join(names) or 'no model'}, {bundle} is for "
            f"{', '.join(models)}: use the pipeline and the bundle of one Wan"
        )
    for name, model in models.items():
        setattr(wan_pipeline, name, model)
    return wan_pipeline


def _embeddings(
    context: Sequence[Tensor], clip_fea: Tensor | None, videos: int
) -> dict[str, Sequence[Tensor]]:
    """What is attended to, by the engine's names, an entry for each video."""
    if clip_fea is None:
        return {"text": context}
    return {"text": context, "image": images_by_video("clip_fea", clip_fea, videos).split(1)}


class CompiledWanModel(EngineModule):
    """One expert of an engine, called and moved about as the official pipelines do `WanModel`."""

    def __call__(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int,
        *,
        clip_fea: Tensor | None = None,
        y: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Return the velocity of each video, [C, F, h, w] in fp32.

        For N videos, which run one after the other: x is N latents [C, F, h, w]; t [N], or
        [N, seq_len] with one value for all tokens of a frame; context N times [n, 4096] with
        n <= 512; y N conditions [20, F, h, w]; clip_fea [N or 2 N, 257, 1280].
        Raises BadRequest for what the engine does not take, for a padded sequence, and for
        sigmas in the place of timesteps.
        """
        if options:
            raise BadRequest(f"the engine takes no {', '.join(options)}: leave it out")
        count, times = len(x), self.times(t)
        for name, given in (("t", times), ("context", context), ("y", x if y is None else y)):
            check_count(name, len(given), count)
        self._check_length(x[0], seq_len)
        self.check_times("t", times)
        inputs: dict[str, Sequence[Tensor]] = {"latent": [latent[None] for latent in x]}
        if y is not None:
            inputs["condition"] = [condition[None] for condition in y]
        inputs |= _embeddings(context, clip_fea, count)
        return [velocity[0] for velocity in self.velocities(times, inputs)]

    def _check_length(self, latent: Tensor, seq_len: int) -> None:
        """Refuse padding; a latent of another shape is the denoiser's to refuse."""
        tokens = self.denoiser.geometry.num_tokens
        if tuple(latent.shape) == self.denoiser.inputs["latent"].shape[1:] and seq_len != tokens:
            raise BadRequest(
                f"seq_len is {seq_len}, engine {self.denoiser.record.name} has {tokens} tokens: "
                f"run without sequence parallelism, which pads them"
            )
