"""CLIP features of images: the ViT-H/14 of Wan's image-to-video models, from either layout.

The official file holds a text encoder beside the ViT; only the ViT is read and converted to
transformers' `CLIPVisionModel`. Features are what the last block but one gives. Images are prepared
as in the official code, also for a diffusers folder: bicubic to 224x224 without antialiasing and
without a crop. diffusers' own image processor differs in both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    needing_extra,
    printable,
)
from wanexport.runtime.key_tables import key_table, required
from wanexport.runtime.machine.memory import free_bytes

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green and blue in [0, 1]
_STD = (0.26862954, 0.26130258, 0.27577711)
_NUM_HEADS = 16  # which no tensor tells
_OFFICIAL_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
_VISUAL = "visual."
_HEAD = "visual.head"  # the projection to CLIP's own embedding, which Wan does not use

_ROWS = {  # official name -> transformers' name
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding.*": "embeddings.patch_embedding.*",
    "visual.pre_norm.*": "pre_layrnorm.*",
    "visual.post_norm.*": "post_layernorm.*",
    "visual.transformer.{}.norm1.*": "encoder.layers.{}.layer_norm1.*",
    "visual.transformer.{}.attn.to_qkv.*": "encoder.layers.{}.self_attn.qkv_proj.*",
    "visual.transformer.{}.attn.proj.*": "encoder.layers.{}.self_attn.out_proj.*",
    "visual.transformer.{}.norm2.*": "encoder.layers.{}.layer_norm2.*",
    "visual.transformer.{}.mlp.0.*": "encoder.layers.{}.mlp.fc1.*",
    "visual.transformer.{}.mlp.2.*": "encoder.layers.{}.mlp.fc2.*",
}
_FUSED = ".to_qkv."  # the official tensor stacks query, key and value
_transformers_name = key_table(_ROWS)


def open_image_encoder(weights: str | Path, *, device: str = "cpu") -> "CLIPImageEncoder":
    """Open the image encoder of a diffusers folder or of the official .pth file.

    It computes in fp16 on a GPU, as the official code does, and in fp32 on a CPU, which is slow in
    fp16. Raises WanExportError without the packages, when a file is missing, damaged or holds
    another model, and when it does not fit in the GPU's memory.
    """
    with needing_extra("pipeline", "the image encoder"):
        import torch
        import transformers  # noqa: F401

    weights = Path(weights)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    open_model = _open_diffusers if weights.is_dir() else _open_official
    model = open_model(weights, dtype)
    try:
        return CLIPImageEncoder(model.to(device))
    except torch.OutOfMemoryError as error:
        raise EngineFailure(
            f"the GPU has {free_bytes(device) / 1e9:.1f} GB free, which do not hold the image "
            f"encoder: free some, or run it on the CPU"
        ) from error


class CLIPImageEncoder:
    """Features of images from a CLIPVisionModel on its device."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Features [1, 257 * len(images), 1280] in fp32 of images [3, H, W] in [-1, 1].

        Raises EngineFailure after `close`, and BadRequest for what is no image.
        """
        if self._model is None:
            raise EngineFailure("the image encoder is closed: open it again")
        import torch

        with torch.inference_mode():
            pixels = torch.cat([self._prepare(image) for image in images])
            states = self._model(pixels, output_hidden_states=True).hidden_states
            features = states[-2].float().cpu().numpy()
        return np.asarray(features).reshape(1, -1, features.shape[-1])

    def _prepare(self, image: np.ndarray) -> Any:
        """The model's input [1, 3, 224, 224]. Overshoot of the resampling is not clipped."""
        import torch
        from torch.nn import functional

        if image.ndim != 3 or image.shape[0] != 3:
            raise BadRequest(f"image has shape {list(image.shape)}, expected [3, H, W]")
        model, side = self._model, self._model.config.image_size
        pixels = torch.as_tensor(image, dtype=torch.float32, device=model.device)[None]
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
        mean, std = pixels.new_tensor([_MEAN, _STD])[..., None, None]
        return ((pixels * 0.5 + 0.5 - mean) / std).to(model.dtype)

    def close(self) -> None:
        """Free the model's memory, that of a GPU too."""
        if self._model is None:
            return
        from wanexport.runtime.parts.torch_checkpoint import free_unused_memory

        self._model = None
        free_unused_memory()


def _open_official(path: Path, dtype: Any) -> Any:
    """A CLIPVisionModel of the visual tensors of the official file."""
    import torch
    from transformers import CLIPVisionModel

    from wanexport.runtime.parts.torch_checkpoint import load_converted, read_state_dict

    official = {
        name: tensor
        for name, tensor in read_state_dict(path).items()
        if name.startswith(_VISUAL) and name != _HEAD
    }
    with torch.device("meta"):
        model = CLIPVisionModel(_config(official, path))
    # Before version 5, transformers wraps the ViT once more.
    vit = getattr(model, "vision_model", model)
    tensors = {
        name: part.to(dtype) for item in official.items() for name, part in _converted(*item)
    }
    load_converted(vit, tensors, path)
    places = vit.embeddings.num_positions
    vit.embeddings.position_ids = torch.arange(places)[None]  # it is in no file
    return model.eval()


def _config(tensors: Mapping[str, Any], path: Path) -> Any:
    """The CLIPVisionConfig that follows from the official tensors.

    Raises BundleError when one that decides it is missing.
    """
    from transformers import CLIPVisionConfig

    what = f"{printable(path)} is no CLIP of Wan's"
    expected = f"the official {_OFFICIAL_FILE}, or a folder image_encoder/"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape = required(shapes, what, expected, BundleError)
    dim, _, patch_size, _ = shape("visual.patch_embedding.weight", 4)
    patches_a_side = math.isqrt(shape("visual.pos_embedding", 3)[1] - 1)
    blocks = {name.split(".")[2] for name in tensors if name.startswith("visual.transformer.")}
    return CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=shape("visual.transformer.0.mlp.0.weight", 2)[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=_NUM_HEADS,
        image_size=patches_a_side * patch_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def _converted(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that an official one becomes, by transformers' names.

    A name that the table lacks is kept, and refused later.
    """
    translated = _transformers_name(name)
    if _FUSED in name:
        for part, rows in zip("qkv", tensor.chunk(3)):
            yield translated.replace("qkv_proj", f"{part}_proj"), rows
    elif name.endswith(("cls_embedding", "pos_embedding")):
        yield translated, tensor.squeeze()
    else:
        yield translated, tensor


def _open_diffusers(folder: Path, dtype: Any) -> Any:
    """The CLIPVisionModel of a folder image_encoder/."""
    from transformers import CLIPVisionModel

    from wanexport.runtime.parts.torch_checkpoint import load_pretrained

    return load_pretrained(CLIPVisionModel, folder, dtype)
