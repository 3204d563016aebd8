"""The VAE engine as a codec, with the graph in the packages' place, beside diffusers' model."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.quick import slow_but
from tests.runtime.bundle.small_bundle import change, manifest_of, put
from tests.runtime.parts import vae_bundle as doubles
from tests.runtime.parts.vae_bundle import EagerRegions, vae_bundle
from wanexport.runtime.bundle.manifest import VAE, read_manifest
from wanexport.runtime.engines.vae_clip import Clip
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportWarning
from wanexport.runtime.host_copy import HostCopy
from wanexport.runtime.parts import open as open_module
from wanexport.runtime.parts import vae_choice as choice_module
from wanexport.runtime.parts import vae_engine as engine_module
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.vae import Vae, open_vae
from wanexport.runtime.parts.vae_choice import choose_vae_engine
from wanexport.runtime.parts.vae_engine import VaeEngine
from wanexport.runtime.parts.vae_load import load_vae

RNG = np.random.default_rng(0)
LATENT = RNG.standard_normal((1, 16, 6, 8, 12), dtype=np.float32)
VIDEO = RNG.uniform(-1, 1, (3, 13, 64, 96)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle that has a VAE engine in chunks of 2, and the VAE's file."""
    with pytest.MonkeyPatch.context() as patch:
        return vae_bundle(tmp_path_factory.mktemp("vae"), patch, vae_chunk=2).parent


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may change, its VAE beside it."""
    monkeypatch.setattr(engine_module, "VaeRegions", EagerRegions)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made), str(tmp_path)))
    return manifest.parent


def parts_of(bundle: Path, **options: Any) -> Parts:
    (denoiser, *_) = read_manifest(bundle).engines
    return Parts(bundle, None, denoiser, "cpu", {}, **options)


@pytest.fixture
def vae(bundle: Path) -> VaeEngine:
    codec = parts_of(bundle).vae()
    assert isinstance(codec, VaeEngine)
    return codec


@pytest.fixture
def eager(bundle: Path) -> Vae:
    """diffusers' model with the same weights."""
    return open_vae(bundle.parent / "Wan2.1_VAE.pth")


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_frames_are_those_of_the_checkpoints_vae(vae: VaeEngine, eager: Vae, count: int) -> None:
    """But for values that lie on a whole number but for the last bit."""
    latent = LATENT[:, :, :count]
    found, expected = vae.decode(latent), eager.decode(latent)
    assert found.shape == expected.shape == (4 * count - 3, 64, 96, 3)
    assert found.dtype == np.uint8 and not vae.tiled
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1 and off.mean() < 1e-3


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_latents_are_those_of_the_checkpoints_vae(vae: VaeEngine, eager: Vae, frames: int) -> None:
    video = VIDEO[:, :frames]
    for given in (video, torch.from_numpy(video)):
        found = vae.encode(given)
        np.testing.assert_allclose(found, eager.encode(video), atol=1e-5, rtol=0)
        assert found.dtype == np.float32


@pytest.mark.parametrize(
    "cuts", slow_but([[1, 2, 3, 4, 5, 6], [6], [2, 5, 6], [3, 6], [4, 5, 6]], [2, 5, 6])
)
def test_a_session_gives_the_frames_of_the_whole_as_latents_come(
    vae: VaeEngine, cuts: list[int]
) -> None:
    """Of two sessions at once, neither sees the other's state."""
    whole = vae.decode(LATENT)
    own, other = vae.session(), vae.session()
    found, begin, known = [], 0, 0
    for end in cuts:
        frames = own.decode(LATENT[:, :, begin:end])
        other.decode(-LATENT[:, :, begin:end])
        known += len(frames)
        assert known == 1 + 8 * ((end - 1) // 2)
        found.append(frames)
        begin = end
    found.append(own.finish())
    joined = np.concatenate(found)
    assert hashlib.md5(joined.tobytes()).digest() == hashlib.md5(whole.tobytes()).digest()
    assert not len(own.finish())


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_chunks_are_the_frames_of_the_whole(vae: VaeEngine, count: int) -> None:
    latent = LATENT[:, :, :count]
    chunks = list(vae.decode_chunks(torch.from_numpy(latent)))
    assert [len(chunk) for chunk in chunks] == {1: [1], 2: [1, 4], 3: [1, 8], 6: [1, 8, 8, 4]}[
        count
    ]
    joined = np.concatenate(chunks)
    whole = vae.decode(latent)
    assert hashlib.md5(joined.tobytes()).digest() == hashlib.md5(whole.tobytes()).digest()


def watched_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each call of the graph from here on, and what else the test adds."""
    events: list[str] = []
    call = Clip._call

    def watch(clip: Clip, when: str, frames: Any) -> Any:
        events.append("computed")
        return call(clip, when, frames)

    monkeypatch.setattr(Clip, "_call", watch)
    return events


def test_a_chunk_is_handed_on_before_the_next_is_computed(
    vae: VaeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the very first, until a second shows that memory suffices."""
    events = watched_calls(monkeypatch)
    for _ in range(2):
        for chunk in vae.decode_chunks(LATENT):
            events.append(f"given {len(chunk)}")
    first = ["computed", "computed", "given 1", "given 8", "computed", "given 8", "computed"]
    later = ["computed", "given 1", "computed", "given 8", "computed", "given 8", "computed"]
    assert events == [*first, "given 4", *later, "given 4"]


def test_a_gpu_has_a_chunk_to_go_on_with_while_another_is_copied(
    vae: VaeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae.decode(LATENT[:, :, :2])
    events = watched_calls(monkeypatch)
    monkeypatch.setattr(HostCopy, "is_there", lambda _: False)
    for chunk in vae.decode_chunks(LATENT):
        events.append(f"given {len(chunk)}")
    assert events == [
        "computed", "computed", "given 1", "computed", "given 8", "computed", "given 8", "given 4",
    ]  # fmt: skip


def test_chunks_nobody_takes_are_not_computed(
    vae: VaeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = watched_calls(monkeypatch)
    chunks = vae.decode_chunks(LATENT)
    next(chunks)
    chunks.close()
    assert events == ["computed", "computed"]
    with pytest.raises(BadRequest, match="NaN or Inf"):
        next(vae.decode_chunks(LATENT * np.float32("nan")))


def test_tensors_stay_on_the_device(vae: VaeEngine) -> None:
    session = vae.session()
    frames = session.decode(torch.from_numpy(LATENT))
    assert isinstance(frames, torch.Tensor) and frames.dtype == torch.uint8
    rest = session.finish(as_tensor=True)
    np.testing.assert_array_equal(torch.cat([frames, rest]).numpy(), vae.decode(LATENT))


def test_a_caller_in_inference_mode_gets_the_same(vae: VaeEngine) -> None:
    expected = vae.decode(LATENT)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(vae.decode(torch.from_numpy(LATENT)), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((1, 48, 1, 8, 12)), r"\[1, 48, 1, 8, 12\] .* takes \[1, 16, F, 8, 12\]"),
        (np.zeros((1, 16, 1, 8, 8)), r"takes \[1, 16, F, 8, 12\]"),
        (np.zeros((16, 1, 8, 12)), r"takes \[1, 16, F, 8, 12\]"),
        (np.zeros((1, 16, 0, 8, 12)), r"takes \[1, 16, F, 8, 12\]"),
        (np.full((1, 16, 1, 8, 12), np.nan), "decode 1536 values that are NaN or Inf"),
        ("text", "no array of numbers"),
    ],
)
def test_what_is_no_latent_of_the_engine_is_refused(
    vae: VaeEngine, value: Any, message: str
) -> None:
    for decode in (vae.decode, vae.session().decode):
        with pytest.raises(BadRequest, match=message):
            decode(value)


@pytest.mark.parametrize("shape", [(3, 4, 64, 96), (3, 5, 64, 64), (1, 5, 64, 96), (3, 64, 96)])
def test_what_is_no_video_of_the_engine_is_refused(vae: VaeEngine, shape: Any) -> None:
    with pytest.raises(BadRequest, match=r"takes \[3, F, 64, 96\], F of 4k\+1"):
        vae.encode(np.zeros(shape, np.float32))


def test_a_closed_engine_says_so(vae: VaeEngine) -> None:
    vae.close()
    vae.close()
    for call in (lambda: vae.decode(LATENT), vae.session, lambda: vae.encode(VIDEO)):
        with pytest.raises(EngineFailure, match="the VAE is closed: open it again"):
            call()


def test_where_memory_is_short_the_checkpoints_vae_cuts_the_picture(
    bundle: Path, eager: Vae, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided once for a task: later calls give the same pixels, whatever is free by then."""
    opened: list[bool | None] = []

    def found(*_: object, tiling: bool | None) -> Vae:
        opened.append(tiling)
        return eager

    monkeypatch.setitem(open_module._OPENERS, "vae", found)
    monkeypatch.setattr(open_module, "find_components", lambda *_, **__: _Found())
    codec = parts_of(bundle).vae()
    assert isinstance(codec, VaeEngine)
    refusing = _refuse_memory(monkeypatch, codec)
    with pytest.warns(WanExportWarning, match=r"failed to decode on cpu .*: tiles are taken"):
        np.testing.assert_array_equal(codec.decode(LATENT), eager.decode(LATENT))
    assert codec.tiled and opened == [True]
    refusing.clear()
    codec.decode(LATENT)
    assert codec.tiled and opened == [True]
    (chunk,) = codec.decode_chunks(LATENT)
    np.testing.assert_array_equal(chunk, eager.decode(LATENT))
    codec.encode(VIDEO)
    assert not codec.tiled


class _Found:
    origin = "x"


def _refuse_memory(monkeypatch: pytest.MonkeyPatch, codec: VaeEngine) -> list[str]:
    """Have decoding run out of memory, while the returned list is not empty."""
    refusing, clip = ["decode"], codec.clip

    def short(part: str) -> Any:
        if part in refusing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clip(part)

    monkeypatch.setattr(codec, "clip", short)
    return refusing


def test_memory_that_is_short_for_the_second_call_gives_no_frame_of_the_first(
    bundle: Path, eager: Vae, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of one video are all of the engine, or all of tiles."""
    monkeypatch.setitem(open_module._OPENERS, "vae", lambda *_, tiling: eager)
    monkeypatch.setattr(open_module, "find_components", lambda *_, **__: _Found())
    codec, call = parts_of(bundle).vae(), Clip._call
    assert isinstance(codec, VaeEngine)

    def short(clip: Clip, when: str, frames: Any) -> Any:
        if when == "next":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(clip, when, frames)

    monkeypatch.setattr(Clip, "_call", short)
    with pytest.warns(WanExportWarning, match=r"failed to decode on cpu .*: tiles are taken"):
        (chunk,) = codec.decode_chunks(LATENT)
    np.testing.assert_array_equal(chunk, eager.decode(LATENT))
    assert codec.tiled


def test_without_tiles_short_memory_is_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = parts_of(bundle, vae_tiling=False).vae()
    assert isinstance(codec, VaeEngine)
    _refuse_memory(monkeypatch, codec)
    with pytest.raises(EngineFailure, match=r"failed to decode on cpu .*smaller --vae-chunk") as e:
        codec.decode(LATENT)
    assert "\n" not in str(e.value)
    with pytest.raises(EngineFailure, match=r"failed to decode on cpu"):
        next(codec.decode_chunks(LATENT))


def test_tiles_that_are_asked_for_are_the_checkpoints_vae(bundle: Path) -> None:
    """Which is found where the bundle says that its VAE came from."""
    assert isinstance(parts_of(bundle, vae_tiling=True).vae(), Vae)
    (bundle.parent / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(BundleError):
        parts_of(bundle, vae_tiling=True).vae()


def test_the_engine_needs_no_checkpoint(bundle: Path) -> None:
    parts = parts_of(bundle)
    parts.find(["vae"])
    (bundle.parent / "Wan2.1_VAE.pth").unlink()
    assert parts.vae().decode(LATENT[:, :, :1]).shape == (1, 64, 96, 3)
    parts.close()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("engines.1.geometry.height", 128),
        ("engines.1.target.device", "cuda"),
        ("engines.1.role", "upscaler"),
    ],
)
def test_an_engine_for_something_else_is_passed_over(
    bundle: Path, place: str, value: object
) -> None:
    (denoiser, _) = read_manifest(bundle).engines
    assert choose_vae_engine(bundle, denoiser, "cpu") is not None
    change(bundle, place, value)
    assert choose_vae_engine(bundle, denoiser, "cpu") is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("engines.1.target.torch", "1.0", "was compiled for torch 1.0, here"),
        ("engines.1.details.sizes.decode_chunk", 3, "cannot be used: its inputs are"),
        ("engines.1.details.sizes.channels", 48, "a VAE with 48 latent channels and stride 8"),
        ("engines.1.layout", "0" * 64, "weights of another layout than this wanexport gives the"),
        ("weights.vae-fp32.role", "denoiser", "the bundle lacks weights of its VAE"),
        ("engines.1.details.attention", {}, "it has kernels for attention of kind"),
    ],
)
def test_an_engine_that_cannot_run_here_says_why(
    bundle: Path, place: str, value: object, message: str
) -> None:
    (denoiser, _) = read_manifest(bundle).engines
    change(bundle, place, value)
    with pytest.warns(WanExportWarning, match=rf"{message}.*runs in eager PyTorch instead"):
        assert choose_vae_engine(bundle, denoiser, "cpu") is None


def test_sizes_of_another_form_cost_the_engine_and_nothing_else(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["engines"][1]["details"]["sizes"]["channels"] = "many"
    manifest = read_manifest(put(bundle, data))
    assert "details of another form" in manifest.engines[1].unfamiliar
    assert not manifest.engines[0].unfamiliar


def test_a_machine_that_is_too_small_is_told_before_anything_is_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (denoiser, _) = read_manifest(bundle).engines
    monkeypatch.setattr(choice_module, "physical_bytes", lambda: 10**5)
    with pytest.warns(WanExportWarning, match=r"GB to decode, of 0\.0 GB here: build it with"):
        assert choose_vae_engine(bundle, denoiser, "cpu") is None


def test_of_two_the_one_for_so_many_frames_serves(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = manifest_of(bundle)
    other = {**data["engines"][1], "geometry": {**data["engines"][1]["geometry"], "frames": 33}}
    data["engines"] = [data["engines"][0], other, data["engines"][1]]
    manifest = read_manifest(put(bundle, data))
    chosen = choose_vae_engine(bundle, manifest.engines[0], "cpu")
    assert chosen is not None and chosen.geometry.frames == 9
    del data["engines"][2]
    put(bundle, data)
    chosen = choose_vae_engine(bundle, manifest.engines[0], "cpu")
    assert chosen is not None and chosen.geometry.frames == 33


def test_altered_packages_and_weights_are_refused(bundle: Path) -> None:
    (_, engine) = read_manifest(bundle).engines
    (bundle / engine.files["decode_next"].path).write_text("another")
    with pytest.raises(BundleError, match=r"decode_next\.pt2"):
        parts_of(bundle).vae()


def test_the_bundles_weights_are_the_engines_alone(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (denoiser, engine) = manifest.engines
    assert engine.role == VAE and engine.name == f"64x96x9/vae-aoti-fp32-{engine.target['arch']}"
    assert [w.role for w in manifest.weights_of(engine.layout, role=VAE)] == [VAE]
    assert not manifest.weights_of(engine.layout)
    assert len(manifest.weights_of(denoiser.layout)) == 1
    assert doubles.PROOF["error"] == engine.proof["error"]


def test_the_vae_opens_alone(bundle: Path) -> None:
    vae = load_vae(bundle, device="cpu", resolution="64x96")
    np.testing.assert_array_equal(vae.decode(LATENT), parts_of(bundle).vae().decode(LATENT))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, r"has no such engine of a VAE; it holds 64x96x9/vae-aoti-fp32-\S+:"),
        ({"resolution": "96x64"}, "has no such engine of a VAE; it holds"),
    ],
)
def test_a_vae_that_is_not_there_is_refused(
    bundle: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        load_vae(bundle, **options)


def test_of_several_sizes_one_must_be_named(bundle: Path) -> None:
    data = manifest_of(bundle)
    other = {**data["engines"][1], "geometry": {**data["engines"][1]["geometry"], "height": 128}}
    data["engines"].append(other)
    put(bundle, data)
    with pytest.raises(BadRequest, match=r"holds several sizes .*: name the resolution"):
        load_vae(bundle)
    with pytest.raises(BundleError, match=r"engine 128x96x9/vae-aoti-fp32-.* cannot be used: its"):
        load_vae(bundle, resolution="128x96")
