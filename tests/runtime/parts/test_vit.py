"""CLIP's image tower is transformers' to the bit, in each dtype."""

import pytest
import torch

from tests.oracles.official_encoders import IMAGE_SIZES, image_shapes, state
from tests.oracles.transformers_encoders import clip_features, clip_of
from wanexport.runtime.parts.vit import VisionTransformer, ViTConfig

SIZES = {"image_size": 42, "patch_size": 14, "dim": 32, "mlp_dim": 128, "num_heads": 16,
         "num_layers": 3, "norm_eps": 1e-5}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 2])
def test_features_are_those_of_transformers_to_the_bit(images: int, dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) for n, t in state(image_shapes(IMAGE_SIZES)).items()}
    ours, theirs = VisionTransformer(ViTConfig(**SIZES)), clip_of(tensors, IMAGE_SIZES)  # type: ignore[arg-type]
    for name, parameter in ours.named_parameters():
        stacked = [letter for letter in "qkv" if f".attn.{letter}." in name]
        for letter in stacked:
            whole = tensors[f"visual.{name.replace(f'.{letter}.', '.to_qkv.')}"]
            parameter.data = whole.chunk(3)["qkv".index(letter)]
        if not stacked:
            parameter.data = tensors[f"visual.{name}"]
    pixels = torch.randn(images, 3, 42, 42).to(dtype)
    with torch.inference_mode():
        features = ours(pixels)
    assert features.shape == (images, 10, 32) and features.dtype == dtype
    assert torch.equal(features, clip_features(theirs, pixels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 15}, "patches of 15 do not fill 42 pixels"),
        ({"patch_size": 84}, "patches of 84 do not fill 42 pixels"),
        ({"num_heads": 5}, "5 heads do not divide 32 channels"),
        ({"num_layers": 0}, "0 layers"),
        ({"norm_eps": -1.0}, "epsilon -1.0"),
    ],
)
def test_sizes_of_which_no_tower_can_be_built_are_refused(
    changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**(SIZES | changes))  # type: ignore[arg-type]
