"""What the parts around the denoiser are, and whether they fit an engine."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from wanexport.runtime.arrays import Array
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.errors import BundleError


class TextEncoder(Protocol):
    """Text embeddings of prompts."""

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """One fp32 [n, text_dim] for each prompt, of its n tokens, 1 <= n <= 512."""


class ImageEncoder(Protocol):
    """CLIP features of images."""

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features [1, 257 * len(images), 1280] in fp32 of images [3, H, W] in [-1, 1]."""


class VideoCodec(Protocol):
    """Pixels to normalised latents and back.

    One with a `device`, PyTorch's name of where it computes, is given videos as tensors there.
    Latents come as tensors from where the engine left them. One with `decode_chunks` gives the
    frames of `decode` a part at a time, [n, H, W, 3], and computes the next while its caller has
    one.
    """

    def encode(self, video: Array) -> np.ndarray:
        """Posterior mean [1, C, f, h, w] in fp32 of a video [3, F, H, W] in [-1, 1]."""

    def decode(self, latent: Array) -> np.ndarray:
        """Frames [F, H, W, 3] in uint8 of a latent [1, C, f, h, w]."""


def decoded_chunks(vae: VideoCodec, latent: Array) -> Iterator[np.ndarray]:
    """The frames of a latent, in the order of time, in as many parts as the VAE gives."""
    in_chunks = getattr(vae, "decode_chunks", None)
    if in_chunks is None:
        yield vae.decode(latent)
    else:
        yield from in_chunks(latent)


def check_text_encoder(encoder: TextEncoder, record: EngineRecord, origin: str) -> None:
    """Raise BundleError when the encoder's width, where it states one, is not the engine's."""
    found, expected = getattr(encoder, "text_dim", None), record.inputs["text"].shape[-1]
    if found not in (None, expected):
        raise BundleError(
            f"the text encoder of {origin} gives {found} values a token, engine {record.name} "
            f"takes {expected}: name the checkpoint of this model (-m, model=)"
        )


def check_vae(vae: VideoCodec, record: EngineRecord, origin: str) -> None:
    """Raise BundleError when the VAE's latents, where it states them, are not the engine's."""
    stated = (getattr(vae, "channels", None), getattr(vae, "spatial_stride", None))
    expected = (record.output.shape[1], record.geometry.spatial_stride)
    if any(found not in (None, right) for found, right in zip(stated, expected)):
        raise BundleError(
            f"the VAE of {origin} has {stated[0]} latent channels, one for {stated[1]}x{stated[1]} "
            f"pixels; engine {record.name} takes {expected[0]} for {expected[1]}x{expected[1]}: "
            f"name the checkpoint of this model (-m, model=)"
        )
