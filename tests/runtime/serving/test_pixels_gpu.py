"""From noise to pixels on a GPU: the host waits for events alone, and a file holds the frames."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles.small_vae import official_file
from wanexport.exporter.build import build
from wanexport.runtime.bundle.check import file_sha256
from wanexport.runtime.host_copy import HostCopy
from wanexport.runtime.load import load
from wanexport.runtime.parts.vae_engine import VaeEngine
from wanexport.runtime.parts.vae_load import load_vae
from wanexport.runtime.sample import plan_of, run_plan, seeded_noise
from wanexport.runtime.serving.finished import finished_steps
from wanexport.runtime.serving.pipeline import Pipeline
from wanexport.runtime.serving.video import write_video
from wanexport.runtime.settings import Settings

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    build(
        "tiny", random_weights=0, resolution="64x96", frames=33, device="cuda", dtype="bf16",
        vae=official_file("Wan2.1", folder), vae_dtype="bf16", vae_chunk=2,
        output=folder / "bundle",
    )  # fmt: skip
    return folder / "bundle"


@contextmanager
def no_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """PyTorch's own waits are errors; the waits for a copy's event are counted, one entry each."""
    waits: list[int] = []
    array = HostCopy.array

    def count(copy: HostCopy) -> Any:
        waits.append(0 if copy.is_there() else 1)
        return array(copy)

    monkeypatch.setattr(HostCopy, "array", count)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "renoise"])
def test_sampling_and_decoding_wait_for_events_alone(
    solver: str, cuda_graph: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, vae = load(bundle, cuda_graph=cuda_graph), load_vae(bundle, device="cuda")
    plan = plan_of(denoiser, Settings(steps=4, guidance=4.0, solver=solver, shift=3.0))
    noise = denoiser.array(seeded_noise(denoiser.inputs["latent"].shape, 0))
    texts = {
        n: denoiser.array(seeded_noise((12, 4096), s)) for n, s in (("text", 1), ("negative", 2))
    }

    def frames() -> tuple[torch.Tensor, np.ndarray]:
        steps = finished_steps(run_plan(denoiser, plan, noise=noise, **texts), "engine")
        *_, last = steps
        assert last.latent.is_cuda
        return last.latent, np.concatenate(list(vae.decode_chunks(last.latent)))

    latent, expected = frames()  # opens what is opened at first need
    with no_waits(monkeypatch) as waits:
        again, found = frames()
    assert torch.equal(again, latent)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(vae.decode(latent), expected)
    chunks = 1 + 4  # of 9 latent frames, 2 at a time
    seeding = solver == "renoise"
    assert len(waits) == 1 + seeding + 4 + chunks  # inputs, the solver's seed, steps, chunks


def test_decoding_whole_waits_once_and_for_an_event(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load_vae(bundle, device="cuda")
    latent = torch.from_numpy(seeded_noise((1, 16, 9, 8, 12), 0)).cuda()
    expected = vae.decode(latent)
    with no_waits(monkeypatch):
        np.testing.assert_array_equal(vae.decode(latent), expected)


def test_frames_of_a_gpu_come_while_a_later_chunk_is_computed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU still sleeps behind the second chunk when the first frames are given."""
    vae = load_vae(bundle, device="cuda")
    assert isinstance(vae, VaeEngine)
    latent = torch.from_numpy(seeded_noise((1, 16, 9, 8, 12), 0)).cuda()
    list(vae.decode_chunks(latent))
    computed = vae._computed

    def slow(given: Any) -> Iterator[torch.Tensor]:
        for frames in computed(given):
            yield frames
            torch.cuda._sleep(400_000_000)  # cycles: about 0.2 s, before the next chunk

    monkeypatch.setattr(vae, "_computed", slow)
    monkeypatch.setattr(HostCopy, "is_there", lambda _: False)  # however fast the GPU is
    chunks = vae.decode_chunks(latent)
    next(chunks)
    assert not torch.cuda.current_stream().query()
    chunks.close()


class Encoder:
    """Embeddings that follow from the text."""

    def __call__(self, prompts: Any) -> list[np.ndarray]:
        return [seeded_noise((len(prompt), 4096), len(prompt)) for prompt in prompts]


def test_a_file_holds_the_frames_of_the_arrays(bundle: Path, tmp_path: Path) -> None:
    with Pipeline(bundle, text_encoder=Encoder()) as pipeline:
        asked: dict[str, Any] = {"seed": 1, "steps": 4}
        made = pipeline.generate("a red circle", **asked)
        assert made.video is not None
        write_video(tmp_path / "arrays.mp4", made.video, made.fps)
        direct = pipeline.generate("a red circle", **asked, output=tmp_path / "direct.mp4")
    np.testing.assert_array_equal(direct.latent, made.latent)
    assert file_sha256(tmp_path / "arrays.mp4") == file_sha256(tmp_path / "direct.mp4")


@pytest.mark.parametrize("resident", [0, 2])
def test_streamed_blocks_and_the_vae_beside_them_give_the_same_frames(
    resident: int, bundle: Path
) -> None:
    """The VAE opens while the engine does."""
    streamed = {"offload": "blocks", "resident_blocks": resident, "open_parts": ("vae",)}
    made = []
    for options in (dict[str, Any](), streamed):
        with Pipeline(bundle, text_encoder=Encoder(), **options) as pipeline:
            made.append(pipeline.generate("a red circle", seed=1, steps=4))
            assert pipeline.denoiser.offload == options.get("offload")
    assert made[0].video is not None and made[1].video is not None
    np.testing.assert_array_equal(made[1].latent, made[0].latent)
    np.testing.assert_array_equal(made[1].video, made[0].video)
