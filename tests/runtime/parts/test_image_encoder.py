"""The image encoder gives what the official code gives, from either layout."""

import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from tests.oracles.official_encoders import (
    IMAGE_SIZES,
    PLACES,
    TEXT_SIZES,
    VALUES,
    VIT_H,
    image_shapes,
    images,
    state,
    text_shapes,
)
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportError
from wanexport.runtime.parts import image_encoder, torch_checkpoint
from wanexport.runtime.parts.image_encoder import CLIPImageEncoder, open_image_encoder

OFFICIAL = json.loads(VALUES.read_text())["features"]
TOKENS = 10  # of one image: a class token and 3x3 patches


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official file, with something of its text encoder; a test must not change it."""
    path = tmp_path_factory.mktemp("checkpoint") / "clip.pth"
    text = {"textual.token_embedding.weight": torch.ones(3, 2), "log_scale": torch.ones(())}
    torch.save({**state(image_shapes(IMAGE_SIZES)), **text}, path)
    return path


@pytest.fixture
def encoder(checkpoint: Path) -> CLIPImageEncoder:
    return open_image_encoder(checkpoint)


@pytest.fixture
def folder(encoder: CLIPImageEncoder, tmp_path: Path) -> Path:
    """The same encoder as a folder of diffusers' layout."""
    encoder._model.save_pretrained(tmp_path / "image_encoder")
    return tmp_path / "image_encoder"


def test_features_are_those_of_the_official_code(encoder: CLIPImageEncoder) -> None:
    features = encoder(images())
    assert features.dtype == np.float32
    assert features.shape == (1, 2 * TOKENS, IMAGE_SIZES["dim"])
    np.testing.assert_allclose(features[0, list(PLACES)], OFFICIAL, atol=5e-5)


def test_features_of_several_images_lie_one_after_another(encoder: CLIPImageEncoder) -> None:
    together = encoder(images())
    for i, image in enumerate(images()):
        (alone,) = encoder([image])
        np.testing.assert_allclose(together[0, i * TOKENS : (i + 1) * TOKENS], alone, atol=2e-5)


def test_a_diffusers_folder_gives_the_same(
    encoder: CLIPImageEncoder, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = open_image_encoder(folder)
    assert capfd.readouterr().err == ""
    np.testing.assert_allclose(opened(images()), encoder(images()), atol=2e-5)


def test_an_fp16_file_is_computed_in_fp32_on_a_cpu(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in torch.load(checkpoint).items()}
    torch.save(tensors, tmp_path / "half.pth")
    features = open_image_encoder(tmp_path / "half.pth")(images())
    assert np.abs(features - features.astype(np.float16)).max() > 0
    difference = np.abs(features[0, list(PLACES)] - OFFICIAL).max()
    assert 0 < difference < 0.05  # of values up to 17, for the rounding of the weights


def test_the_published_encoder_has_these_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = image_shapes(VIT_H)
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    monkeypatch.setattr(torch_checkpoint, "read_state_dict", lambda _: published)
    model = image_encoder._open_official(Path("published.pth"), torch.float16)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.image_size) == (1280, 32, 224)
    assert (config.num_attention_heads, config.intermediate_size) == (16, 5120)
    # ViT-H/14, without the projection to CLIP's own embedding: 0.63e9 parameters.
    assert sum(parameter.numel() for parameter in model.parameters()) == 630766080


def test_close_frees_the_model_at_once(encoder: CLIPImageEncoder) -> None:
    encoder(images())
    model = weakref.ref(encoder._model)
    gc.disable()  # what runs by itself
    try:
        encoder.close()
    finally:
        gc.enable()
    encoder.close()
    assert model() is None
    with pytest.raises(EngineFailure, match="image encoder is closed: open it again"):
        encoder(images())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("visual.pos_embedding"), r"no CLIP of Wan's: .* visual\.pos_embedding of"),
        (
            lambda t: t.pop("visual.transformer.2.attn.to_qkv.bias"),
            r"missing encoder\.layers\.2\.self_attn\.k_proj\.bias; missing .*q_proj.*v_proj",
        ),
        (lambda t: t.update({"visual.extra": torch.ones(1)}), r"unexpected visual\.extra"),
        (
            lambda t: t.update({"visual.pre_norm.bias": torch.ones(5)}),
            r"pre_layrnorm\.bias is \[5\], expected \[32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = torch.load(checkpoint)
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pth")
    with pytest.raises(BundleError, match=message) as refused:
        open_image_encoder(tmp_path / "changed.pth")
    assert "\n" not in str(refused.value)


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(state(text_shapes(TEXT_SIZES)), tmp_path / "t5.pth")
    with pytest.raises(BundleError, match=r"t5\.pth is no CLIP of Wan's.*expected the official"):
        open_image_encoder(tmp_path / "t5.pth")


def test_a_folder_that_lacks_a_tensor_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(BundleError, match=r"CLIPVisionModel: missing .*layers\.3\.") as refused:
        open_image_encoder(folder)
    assert "\n" not in str(refused.value)


def test_a_gpu_that_does_not_hold_the_encoder_is_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CLIPVisionModel, "to", refuse)
    with pytest.raises(EngineFailure, match=r"GB free, which do not hold the image encoder: free"):
        open_image_encoder(checkpoint)


def test_what_is_no_image_is_refused(encoder: CLIPImageEncoder) -> None:
    with pytest.raises(BadRequest, match=r"image has shape \[4, 20, 20\], expected \[3, H, W"):
        encoder([np.zeros((4, 20, 20), np.float32)])


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_named_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"the image encoder needs {package}; from a clone .*pip install '.\\[pipeline\\]'$"
    with pytest.raises(WanExportError, match=message):
        open_image_encoder(checkpoint)
