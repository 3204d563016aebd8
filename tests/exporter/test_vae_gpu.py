"""A VAE engine on a GPU: built, proven, and its frames beside those of diffusers' model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracles.small_vae import official_file
from wanexport.exporter.build import build
from wanexport.runtime.load import load
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.vae import open_vae
from wanexport.runtime.parts.vae_engine import VaeEngine

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    for dtype in ("fp32", "bf16"):
        build(
            "tiny", random_weights=0, resolution="64x96", frames=9, device="cuda", dtype="bf16",
            vae=official_file("Wan2.1", folder), vae_dtype=dtype, vae_chunk=2,
            output=folder / "bundle",
        )  # fmt: skip
    return folder / "bundle"


@pytest.fixture
def vae(bundle: Path) -> VaeEngine:
    denoiser = load(bundle)
    codec = Parts(bundle, None, denoiser.record, denoiser.device, {}).vae()
    assert isinstance(codec, VaeEngine) and codec.record.dtype == "bf16"
    return codec


def latent(frames: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 16, frames, 8, 12), dtype=np.float32)


def test_frames_in_bf16_are_near_those_of_fp32(bundle: Path, vae: VaeEngine) -> None:
    expected = open_vae(bundle.parent / "Wan2.1_VAE.pth").decode(latent(6))
    found = vae.decode(torch.from_numpy(latent(6)).cuda())
    off = np.abs(found.astype(int) - expected)
    assert off.mean() < 2 and off.max() < 40


def test_a_session_gives_the_same_frames_on_the_gpu(vae: VaeEngine) -> None:
    session, given = vae.session(), torch.from_numpy(latent(6)).cuda()
    parts = [session.decode(given[:, :, i : i + 1]) for i in range(6)]
    frames = torch.cat([*parts, session.finish(as_tensor=True)])
    assert frames.is_cuda
    np.testing.assert_array_equal(frames.cpu().numpy(), vae.decode(latent(6)))


def test_settings_of_the_process_turn_no_convolution_to_tf32(bundle: Path, vae: VaeEngine) -> None:
    video = np.random.default_rng(1).uniform(-1, 1, (3, 9, 64, 96)).astype(np.float32)
    expected = open_vae(bundle.parent / "Wan2.1_VAE.pth").encode(video)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        found = vae.encode(video)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
