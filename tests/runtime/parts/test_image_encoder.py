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
from torch.nn import functional

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
from tests.oracles.transformers_encoders import clip_features, clip_of
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportError
from wanexport.runtime.parts import fill_model, vit_files
from wanexport.runtime.parts.fill_model import read_to
from wanexport.runtime.parts.image_encoder import CLIPImageEncoder, open_image_encoder, prepared
from wanexport.runtime.parts.stored import StoredTensor

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
def folder(tmp_path: Path) -> Path:
    """The same encoder as a folder of diffusers' layout."""
    clip_of(state(image_shapes(IMAGE_SIZES)), IMAGE_SIZES).save_pretrained(tmp_path / "image")
    return tmp_path / "image"


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


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_both_layouts_give_the_bits_of_transformers(
    layout: str, checkpoint: Path, folder: Path
) -> None:
    opened = open_image_encoder(checkpoint if layout == "official" else folder)
    theirs = clip_of(state(image_shapes(IMAGE_SIZES)), IMAGE_SIZES)
    features = clip_features(theirs, torch.cat([prepared_here(image) for image in images()]))
    assert np.array_equal(opened(images())[0], features.flatten(0, 1).numpy())


def prepared_here(image: np.ndarray) -> Tensor:
    """An image as the official code gives it to its tower, in fp32."""
    pixels = functional.interpolate(torch.from_numpy(image)[None], (42, 42), mode="bicubic")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (pixels * 0.5 + 0.5 - mean) / std


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_what_several_threads_read_to_a_device_is_rounded_as_transformers_would(
    layout: str, checkpoint: Path, folder: Path
) -> None:
    model, found = vit_files.find_vit(checkpoint if layout == "official" else folder)
    assert all(each.file is not None for each in found.values())
    values = read_to(torch.device("cpu"), found, torch.float16)
    model.load_state_dict(values, assign=True)
    theirs = clip_of(state(image_shapes(IMAGE_SIZES)), IMAGE_SIZES).half()
    pixels = prepared_here(images()[0]).half()
    with torch.inference_mode():
        assert torch.equal(model(pixels), clip_features(theirs, pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_on_a_gpu_it_has_the_bits_of_transformers(
    layout: str, checkpoint: Path, folder: Path
) -> None:
    opened = open_image_encoder(checkpoint if layout == "official" else folder, device="cuda")
    theirs = clip_of(state(image_shapes(IMAGE_SIZES)), IMAGE_SIZES).half().to("cuda")
    pixels = torch.cat([prepared(image, 42, torch.float16, "cuda") for image in images()])
    features = clip_features(theirs, pixels).float().cpu()
    assert np.array_equal(opened(images())[0], features.flatten(0, 1).numpy())


def test_a_folder_of_all_of_clip_will_do(folder: Path, encoder: CLIPImageEncoder) -> None:
    """transformers' CLIPModel: its config has the tower's in it, its files more tensors."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"vision_config": config}))
    tensors = load_file(folder / "model.safetensors")
    wrapped = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in tensors.items()}
    save_file({**wrapped, "logit_scale": torch.ones(())}, folder / "model.safetensors")
    assert np.array_equal(open_image_encoder(folder)(images()), encoder(images()))
    bare = {n.removeprefix("vision_model."): t for n, t in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    assert np.array_equal(open_image_encoder(folder)(images()), encoder(images()))


def test_an_fp16_file_is_computed_in_fp32_on_a_cpu(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in torch.load(checkpoint).items()}
    torch.save(tensors, tmp_path / "half.pth")
    features = open_image_encoder(tmp_path / "half.pth")(images())
    assert np.abs(features - features.astype(np.float16)).max() > 0
    difference = np.abs(features[0, list(PLACES)] - OFFICIAL).max()
    assert 0 < difference < 0.05  # of values up to 17, for the rounding of the weights


def test_the_published_encoder_has_these_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = image_shapes(VIT_H)
    published = {n: StoredTensor(torch.empty(s, device="meta")) for n, s in shapes.items()}
    monkeypatch.setattr(vit_files, "read_stored", lambda _: published)
    model, _ = vit_files.find_vit(Path("published.pth"))
    config = model.config
    assert (config.dim, config.num_layers, config.image_size) == (1280, 32, 224)
    assert (config.num_heads, config.mlp_dim, config.num_tokens) == (16, 5120, 257)
    # ViT-H/14, without the projection to CLIP's own embedding: 0.63e9 parameters.
    assert sum(parameter.numel() for parameter in model.parameters()) == 630766080


def test_close_frees_the_model_at_once(encoder: CLIPImageEncoder) -> None:
    encoder(images())
    assert encoder._model is not None
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
            r"missing visual\.transformer\.2\.attn\.to_qkv\.bias: download",
        ),
        (lambda t: t.update({"visual.extra": torch.ones(1)}), r"unexpected visual\.extra"),
        (
            lambda t: t.update({"visual.pre_norm.bias": torch.ones(5)}),
            r"visual\.pre_norm\.bias is \[5\], expected \[32\]",
        ),
        (
            lambda t: t.update({"visual.transformer.1.attn.to_qkv.bias": torch.ones(())}),
            r"visual\.transformer\.1\.attn\.to_qkv\.bias is \[\], expected \[96\]",
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
    with pytest.raises(BundleError, match=r"Transformer: missing .*layers\.3\.") as refused:
        open_image_encoder(folder)
    assert "\n" not in str(refused.value)


def test_a_gpu_that_does_not_hold_the_encoder_is_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fill_model, "read_to", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 10**10))
    with pytest.raises(
        EngineFailure, match=r"5\.0 GB free, which do not hold the image encoder: f"
    ):
        open_image_encoder(checkpoint, device="cuda:1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "is no CLIP of Wan's: its hidden_act is 'quick_gelu', exp"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers of config.json is 1000000000, expected"),
        ({"num_attention_heads": 5}, "is no CLIP of Wan's: 5 heads do not divide 32 channels"),
        ({"patch_size": 13}, "is no CLIP of Wan's: patches of 13 do not fill 42 pixels"),
        ({"image_size": 56}, r"position_embedding.weight is \[10, 32\], expected \[1, 17, 32\]"),
        ({"intermediate_size": 40}, r"mlp\.fc1\.bias is \[128\], expected \[40\]"),
        ({"layer_norm_eps": None}, "is no CLIP of Wan's"),
    ],
)
def test_a_config_of_another_model_is_refused_in_one_line(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BundleError, match=message) as refused:
        open_image_encoder(folder)
    assert "\n" not in str(refused.value)


def test_what_is_no_image_is_refused(encoder: CLIPImageEncoder) -> None:
    with pytest.raises(BadRequest, match=r"image has shape \[4, 20, 20\], expected \[3, H, W"):
        encoder([np.zeros((4, 20, 20), np.float32)])


def test_a_missing_package_is_named_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    message = "the image encoder needs torch; from a clone .*pip install '.\\[pipeline\\]'$"
    with pytest.raises(WanExportError, match=message):
        open_image_encoder(checkpoint)
