"""CLIP features of images: the ViT-H/14 of Wan's image-to-video models, from either layout.

The official file holds a text encoder beside the ViT; only the ViT is read. Features are what its
last block but one gives. Images are prepared as in the official code, also for a diffusers folder:
bicubic to 224x224 without antialiasing and without a crop. diffusers' own image processor differs
in both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.errors import BadRequest, EngineFailure, needing_extra
from wanexport.runtime.machine.memory import free_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wanexport.runtime.parts.stored import StoredTensor
    from wanexport.runtime.parts.vit import VisionTransformer

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green and blue in [0, 1]
_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image_encoder(weights: str | Path, *, device: str = "cpu") -> "CLIPImageEncoder":
    """Open the image encoder of a diffusers folder or of the official .pth file.

    It computes in fp16 on a GPU, as the official code does, and in fp32 on a CPU, which is slow in
    fp16. Raises WanExportError without the packages, when a file is missing, damaged or holds
    another model, and when it does not fit in the GPU's memory.
    """
    with needing_extra("pipeline", "the image encoder"):
        import torch  # noqa: F401

        from wanexport.runtime.parts.vit_files import find_vit
    return _filled(*find_vit(Path(weights)), device)


def open_carried_image_encoder(file: PinnedFile, *, device: str = "cpu") -> "CLIPImageEncoder":
    """Open the image encoder of a bundle that carries one. Raises as open_image_encoder does."""
    with needing_extra("pipeline", "the image encoder"):
        import torch  # noqa: F401

        from wanexport.runtime.parts.vit_files import find_carried_vit
    return _filled(*find_carried_vit(file), device)


def _filled(
    model: "VisionTransformer", tensors: Mapping[str, "StoredTensor"], device: str
) -> "CLIPImageEncoder":
    """The encoder on its device. Raises EngineFailure when a GPU does not hold it."""
    import torch

    from wanexport.runtime.parts.fill_model import fill_model

    place = torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.float16
    try:
        return CLIPImageEncoder(fill_model(model, tensors, place, dtype))
    except torch.OutOfMemoryError as error:
        raise EngineFailure(
            f"the GPU has {free_bytes(device) / 1e9:.1f} GB free, which do not hold the image "
            f"encoder: free some, or run it on the CPU"
        ) from error


class CLIPImageEncoder:
    """Features of images from a tower on its device."""

    def __init__(self, model: "VisionTransformer") -> None:
        self._model: VisionTransformer | None = model

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features [1, 257 * len(images), 1280] in fp32 of images [3, H, W] in [-1, 1].

        Raises EngineFailure after `close`, and BadRequest for what is no image.
        """
        if self._model is None:
            raise EngineFailure("the image encoder is closed: open it again")
        import torch

        with torch.inference_mode():
            weight, side = self._model.patch_embedding.weight, self._model.config.image_size
            pixels = torch.cat([prepared(i, side, weight.dtype, weight.device) for i in images])
            features = self._model(pixels).float().cpu().numpy()
        return np.asarray(features).reshape(1, -1, features.shape[-1])

    def close(self) -> None:
        """Free the model's memory, that of a GPU too."""
        if self._model is None:
            return
        from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

        self._model = None
        free_unused_memory()


def prepared(
    image: np.ndarray, side: int, dtype: "torch.dtype", device: "torch.device | str"
) -> "Tensor":
    """The tower's input [1, 3, side, side]. Overshoot of the resampling is not clipped."""
    import torch
    from torch.nn import functional

    if image.ndim != 3 or image.shape[0] != 3:
        raise BadRequest(f"image has shape {list(image.shape)}, expected [3, H, W]")
    pixels = torch.as_tensor(image, dtype=torch.float32, device=device)[None]
    pixels = functional.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
    mean, std = pixels.new_tensor([_MEAN, _STD])[..., None, None]
    return ((pixels * 0.5 + 0.5 - mean) / std).to(dtype)
