"""A bundle's engine in the place of `WanTransformer3DModel` in diffusers' Wan pipelines.

It is called and asked as the pipelines do it; loading, saving, training and patching a model's
modules are not there. diffusers is imported when an engine is opened, not with this file.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.drop_in.experts import (
    HIGH_NOISE,
    LOW_NOISE,
    EngineModule,
    check_count,
    images_by_video,
    one_for_each,
    open_experts,
)
from wanexport.runtime.engines.engine import EngineKeywords
from wanexport.runtime.errors import BadRequest, needing_extra, refuse_empty
from wanexport.runtime.geometry import PATCH
from wanexport.runtime.wan_config import WanConfig

_CLIP_TOKENS = 257  # of one image
_IMAGE_DIM = 1280  # width of CLIP ViT-H/14 features


class CompiledWanTransformer(EngineModule):
    """The engine of a bundle as `pipe.transformer` of WanPipeline or WanImageToVideoPipeline.

    load_options are those of `load`. The engine of one expert of two is passed as `denoiser`: see
    `compiled_experts`, which makes both. Inputs and outputs are fp32 whatever the engine's
    precision, so a pipeline guides and steps in fp32, as the official code does.
    Raises what `load` raises, BundleError without diffusers, BadRequest for two experts.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        denoiser: Denoiser | None = None,
        **load_options: Unpack[EngineKeywords],
    ) -> None:
        if denoiser is not None and load_options:
            raise BadRequest(
                f"this engine is open already: pass {', '.join(load_options)} where you open it"
            )
        self.config = transformer_config(bundle)
        super().__init__(denoiser or _only_model(bundle, load_options))

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Return the velocity [B, C, F, h, w] in fp32, in a tuple or a Transformer2DModelOutput.

        hidden_states is [B, C, F, h, w], for image-to-video latent and condition [B, 16 + 20, ...];
        timestep [B], or [B, L] with one value for all tokens of a frame; encoder_hidden_states
        [B, 512, 4096]; encoder_hidden_states_image [B or 2 B, 257, 1280]. Text and images of one
        video serve all of a batch, whose videos run one after the other. Raises BadRequest for
        shapes that the engine does not take, for sigmas in the place of timesteps, and for options
        that it cannot honour.
        """
        _refuse_options(attention_kwargs, options)
        inputs = self._split(hidden_states)
        self._check_rows(encoder_hidden_states)
        batch, image = hidden_states.shape[0], encoder_hidden_states_image
        times = self.times(timestep)
        check_count("timestep", times.shape[0], batch)
        inputs["text"] = one_for_each("encoder_hidden_states", encoder_hidden_states, batch)
        if image is not None:
            inputs |= self._images(image, batch)
        self.check_times("timestep", times)
        by_video = {name: value.split(1) for name, value in inputs.items()}
        velocity = torch.cat(self.velocities(times, by_video))
        if not return_dict:
            return (velocity,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=velocity)

    def cache_context(self, name: str, **step: Any) -> AbstractContextManager[None]:
        """Where a pipeline tells its caches about the call: an engine has none."""
        return nullcontext()

    def _images(self, image: Tensor, batch: int) -> dict[str, Tensor]:
        """CLIP features [n, 257, 1280] as the input [batch, tokens of a video, 1280]."""
        name, spec = "encoder_hidden_states_image", self.denoiser.inputs.get("image")
        images = image.shape[0] * image.shape[1] if image.ndim == 3 else 0
        videos = batch if spec is None else images // spec.shape[1]
        if videos != 1:
            return {"image": images_by_video(name, image, batch)}
        return {"image": one_for_each(name, images_by_video(name, image, 1), batch)}

    def _split(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """Latent and condition, which diffusers concatenates in this order."""
        wanted = self.config["in_channels"]
        if hidden_states.ndim != 5 or 0 in hidden_states.shape or hidden_states.shape[1] != wanted:
            raise BadRequest(
                f"hidden_states has shape {list(hidden_states.shape)}, engine "
                f"{self.denoiser.record.name} takes [B, {wanted}, F, h, w]: use the pipeline and "
                f"the bundle of one model"
            )
        channels = self.config["out_channels"]
        if channels == wanted:
            return {"latent": hidden_states}
        return {"latent": hidden_states[:, :channels], "condition": hidden_states[:, channels:]}

    def _check_rows(self, text: Tensor) -> None:
        """Refuse fewer rows: diffusers' model attends to them alone, the engine to zeros after."""
        rows = self.denoiser.inputs["text"].shape[1]
        if text.ndim != 3 or text.shape[1] != rows:
            raise BadRequest(
                f"encoder_hidden_states has shape {list(text.shape)}, the engine takes "
                f"[B, {rows}, {self.config['text_dim']}]: encode prompts with "
                f"max_sequence_length={rows}"
            )


def compiled_experts(
    bundle: str | Path, **load_options: Unpack[EngineKeywords]
) -> tuple[CompiledWanTransformer, CompiledWanTransformer]:
    """`pipe.transformer` and `pipe.transformer_2` of a model with two experts, opened together.

    The first is the high-noise expert. The pipeline's `boundary_ratio` says which one serves a
    step. load_options are those of `load`, `offload` among them.
    Raises what `load` raises, and BadRequest for a bundle of one model.
    """
    denoisers = open_experts(bundle, **load_options)
    if set(denoisers) != {HIGH_NOISE, LOW_NOISE}:
        raise BadRequest(f"{bundle} has one model, not two: use CompiledWanTransformer")
    high, low = (
        CompiledWanTransformer(bundle, denoiser=denoisers[expert])
        for expert in (HIGH_NOISE, LOW_NOISE)
    )
    return high, low


def transformer_config(bundle: str | Path) -> Mapping[str, Any]:
    """The config of a bundle's model as `WanTransformer3DModel` has it, with keys as attributes.

    Raises BundleError without diffusers, and for a manifest that cannot be read.
    """
    with needing_extra("diffusers", "a transformer for diffusers"):
        from diffusers.configuration_utils import FrozenDict
    refuse_empty(bundle=bundle)
    return FrozenDict(diffusers_names(read_manifest(Path(bundle)).config))


def diffusers_names(config: WanConfig) -> dict[str, Any]:
    """The settings of `WanTransformer3DModel` for a config."""
    image_tokens = config.image_tokens
    return {
        "patch_size": (1, PATCH, PATCH),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": _IMAGE_DIM if image_tokens else None,
        "added_kv_proj_dim": config.dim if image_tokens else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": image_tokens if image_tokens > _CLIP_TOKENS else None,
    }


def _only_model(bundle: str | Path, load_options: EngineKeywords) -> Denoiser:
    denoisers = open_experts(bundle, **load_options)
    if len(denoisers) > 1:
        raise BadRequest(
            f"{bundle} has two experts: pipe.transformer, pipe.transformer_2 = "
            f"compiled_experts(bundle)"
        )
    return next(iter(denoisers.values()))


def _refuse_options(attention_kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
    """A LoRA's scale of 1 is what a pipeline without LoRA may pass; nothing else has a meaning."""
    refused = {k: v for k, v in (attention_kwargs or {}).items() if (k, v) != ("scale", 1)}
    if refused or options:
        given = ", ".join(f"{key}={value!r:.40}" for key, value in {**refused, **options}.items())
        raise BadRequest(
            f"a compiled transformer cannot honour {given}: leave it out, or use diffusers' own"
        )
