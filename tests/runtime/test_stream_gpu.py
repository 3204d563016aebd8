"""A stream on a GPU: no host wait in a chunk, and the same bits after one that was left."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from wanexport.exporter.build import build
from wanexport.exporter.profile.profile import profile
from wanexport.graphs.config import PRESETS
from wanexport.runtime import load
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.sample_stream import ChunkStep, sample_stream

pytestmark = pytest.mark.gpu

WINDOW = {"window": 7, "sink": 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of random weights at 64x96, in chunks of 3 with a cache of 7."""
    path = tmp_path_factory.mktemp("causal") / "bundle"
    build(
        "causal-tiny", random_weights=0, resolution="64x96", frames=81, chunk=3, cache=7,
        backends=["aoti"], device="cuda", dtype="bf16", output=path,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def denoiser(bundle: Path) -> Iterator[Denoiser]:
    opened = load(bundle)
    yield opened
    opened.close()


def text() -> torch.Tensor:
    return torch.randn(77, 4096, generator=torch.Generator().manual_seed(0))


@contextmanager
def refusing_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_a_loop_never_waits_for_the_gpu(denoiser: Denoiser) -> None:
    """Noise that the host draws, every chunk's place, steps and commits: 1-3-3-..., then ragged."""
    stream = denoiser.stream(text(), **WINDOW)
    for _ in sample_stream(stream, frames=4, independent_first_frame=True):
        pass  # libraries are set up, and pinned memory is there
    stream.reset()
    latents = []
    with refusing_waits():
        for chunk in sample_stream(stream, frames=15, independent_first_frame=True):
            latents.append(chunk.latent)
    assert all(latent.is_cuda and latent.isfinite().all() for latent in latents)
    assert [latent.shape[2] for latent in latents] == [1, 3, 3, 3, 3, 2]


def test_a_step_with_timesteps_of_each_frame_never_waits(denoiser: Denoiser) -> None:
    stream = denoiser.stream(text(), **WINDOW)
    _, height, width = denoiser.geometry.latent
    latent = torch.randn(1, 16, 2, height, width, device="cuda")
    stream.step(latent, 1000.0)
    times = torch.tensor([900.0, 800.0], device="cuda")
    with refusing_waits():
        for given in (times, np.array([900.0, 800.0], np.float32), 625.0):
            velocity = stream.step(latent, given)
        stream.commit(latent)
    assert velocity.shape == latent.shape and velocity.isfinite().all()


def test_a_loop_that_was_left_gives_the_same_bits_again(denoiser: Denoiser) -> None:
    class Left(Exception):
        pass

    def leave(step: ChunkStep) -> None:
        if (step.chunk, step.index) == (3, 2):
            raise Left

    stream = denoiser.stream(text(), **WINDOW)
    whole = [chunk.latent for chunk in sample_stream(stream, frames=18, seed=3)]
    stream.reset()
    with pytest.raises(Left):
        for _ in sample_stream(stream, frames=18, seed=3, on_step=leave):
            pass
    assert stream.position == 9
    stream.rewind(0)
    stream.reset()
    again = [chunk.latent for chunk in sample_stream(stream, frames=18, seed=3)]
    assert all(map(torch.equal, whole, again))


def test_two_streams_do_not_meet_on_a_gpu(denoiser: Denoiser) -> None:
    def begin(seed: int) -> Iterator[torch.Tensor]:
        stream = denoiser.stream(text(), **WINDOW)
        return (chunk.latent for chunk in sample_stream(stream, frames=12, seed=seed))

    alone = [list(begin(seed)) for seed in range(2)]
    both = list(zip(begin(0), begin(1)))
    for index, latents in enumerate(both):
        assert all(torch.equal(latent, alone[i][index]) for i, latent in enumerate(latents))


def test_memory_stays_flat_on_a_gpu(denoiser: Denoiser) -> None:
    stream = denoiser.stream(text(), **WINDOW)
    taken = []
    for _ in range(4):
        for _ in sample_stream(stream, frames=30):
            pass
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    assert taken[1] == taken[-1]


@pytest.mark.parametrize("resident", [0, 1, PRESETS["causal-tiny"].config.num_layers])
def test_streamed_blocks_make_the_same_video_and_never_wait(
    bundle: Path, denoiser: Denoiser, resident: int
) -> None:
    """Steps and commits, of which the last layer runs another call, go through the same buffers."""
    streamed = load(bundle, offload="blocks", resident_blocks=resident)
    assert (streamed.offload, streamed.resident_blocks) == ("blocks", resident)
    whole = denoiser.stream(text(), **WINDOW)
    expected = [chunk.latent for chunk in sample_stream(whole, frames=14, seed=3)]
    stream = streamed.stream(text(), **WINDOW)
    for number in range(2):
        with refusing_waits() if number else nullcontext():
            found = [chunk.latent for chunk in sample_stream(stream, frames=14, seed=3)]
        assert len(found) == 5 and all(map(torch.equal, found, expected))
        stream.reset()
    streamed.close()


def test_streams_of_streamed_blocks_do_not_meet(bundle: Path, denoiser: Denoiser) -> None:
    """Two videos, chunk by chunk in turn, of one engine with other texts and places."""
    streamed = load(bundle, offload="blocks", resident_blocks=0)

    def begin(own: Denoiser, seed: int) -> Iterator[torch.Tensor]:
        stream = own.stream(text() * (1 - 2 * seed), **WINDOW)
        return (chunk.latent for chunk in sample_stream(stream, frames=12, seed=seed))

    alone = [list(begin(denoiser, seed)) for seed in range(2)]
    for index, latents in enumerate(zip(begin(streamed, 0), begin(streamed, 1), strict=True)):
        assert all(torch.equal(latent, alone[i][index]) for i, latent in enumerate(latents))
    streamed.close()


def test_a_profile_sees_no_wait_in_a_step(bundle: Path, tmp_path: Path) -> None:
    result = profile(bundle, report=tmp_path)
    assert not result["waits"]["for_gpu"] and not result["waits"]["reads"]
