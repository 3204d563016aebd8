"""The loop of a causal video against Self-Forcing's own, written out in fp64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.causal_stream import CONFIG, random_weights
from tests.oracles.causal_oracle import CausalOracle
from tests.oracles.plain_wan64 import as_fp64
from tests.runtime.causal_engine import causal_denoiser, geometry_of, joined, latent_of, text_of
from wanexport.runtime import sample_stream as module
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.sample_stream import ChunkStep, cut, sample_stream, steps_of
from wanexport.runtime.stream import Stream

FRAMES = 9
GEOMETRY = geometry_of(FRAMES)
TIMES = (1000.0, 937.5, 833.3333, 625.0)
SIGMAS = (1.0, 0.9375, 0.8333333, 0.625)


def draws(seed: int) -> Any:
    """Random numbers as a stream of them, whatever the shapes that they are asked in."""
    dice = np.random.default_rng(seed)
    return lambda shape: dice.standard_normal(shape, np.float32)


class Official:
    """`CausalInferencePipeline.inference` with the fp64 model, latents being [frames, 16, h, w].

    Each keyword plants one mistake.
    """

    def __init__(
        self,
        *,
        truncated: bool = False,  # timesteps to whole numbers
        other_sigma: bool = False,  # of the step before, for the noise
        noise_by_chunk: bool = False,  # in place of the whole first
        draws_last: bool = False,  # noise after the last step too
        no_commit: bool = False,  # the keys of the last step stay
        **policy: Any,
    ) -> None:
        self.times = [float(int(t)) for t in TIMES] if truncated else [*TIMES]
        self.other_sigma, self.noise_by_chunk = other_sigma, noise_by_chunk
        self.draws_last, self.no_commit = draws_last, no_commit
        self.model = CausalOracle(
            as_fp64(random_weights(CONFIG)), 2, 3, CONFIG.num_heads, CONFIG.num_layers,
            torch.from_numpy(text_of()).double(), CONFIG.text_len, **policy,
        )  # fmt: skip

    def velocity(self, z: np.ndarray, time: float, start: int) -> np.ndarray:
        latent = torch.from_numpy(np.swapaxes(z, 0, 1).copy()).double()
        found = self.model.velocity(latent, [time] * len(z), start)
        return np.swapaxes(found.numpy(), 0, 1)

    def __call__(self, draw: Any, frames: int, sizes: list[int], start: int = 0) -> np.ndarray:
        """Frames [frames, 16, h, w], of which the first has the number start."""
        shape = (16, 4, 6)
        noise = None if self.noise_by_chunk else draw((frames, *shape))
        output, begin = [], 0
        for count in sizes:
            z = draw((count, *shape)) if noise is None else noise[begin : begin + count]
            for index, time in enumerate(self.times):
                x0 = z - SIGMAS[index] * self.velocity(z, time, start)
                is_last = index == len(self.times) - 1
                if not is_last or self.draws_last:
                    fresh = draw((count, *shape))
                if not is_last:
                    sigma = SIGMAS[index if self.other_sigma else index + 1]
                    z = (1 - sigma) * x0 + sigma * fresh
            if not self.no_commit:
                self.velocity(x0, 0.0, start)
            output.append(x0)
            start, begin = start + count, begin + count
        return np.concatenate(output)


def stream_of(**policy: Any) -> Stream:
    return causal_denoiser(GEOMETRY)[0].stream(text_of(), **policy)


def sampled(stream: Stream, **options: Any) -> np.ndarray:
    """The latent of a loop, as frames [frames, 16, h, w]."""
    latents = [chunk.latent for chunk in sample_stream(stream, **options)]
    return np.swapaxes(joined(latents)[0], 0, 1)


def error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    """The loop of the runtime over nine frames."""
    return sampled(stream_of(), draw=draws(3))


def test_the_loop_is_that_of_the_official_pipeline(whole: np.ndarray) -> None:
    assert error(whole, Official()(draws(3), 9, [3, 3, 3])) <= 1e-5


MISTAKES = {"truncated": 1e-4, "other_sigma": 1e-2, "noise_by_chunk": 1e-1, "draws_last": 1e-1,
            "no_commit": 1e-3}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_loop_with_a_mistake_is_seen(mistake: str, whole: np.ndarray) -> None:
    found = Official(**{mistake: True})(draws(3), 9, [3, 3, 3])
    assert error(whole, found) > MISTAKES[mistake]


CLIPS: dict[str, tuple[int, list[int], dict[str, Any], dict[str, Any]]] = {
    "frames by three": (9, [3, 3, 3], {}, {}),
    "a first chunk of one frame": (7, [1, 3, 3], {"independent_first_frame": True}, {}),
    "a short last chunk": (8, [3, 3, 2], {"frames": 8}, {}),
    "a window with a sink": (15, [3] * 5, {"frames": 15}, {"window": 7, "sink": 1}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_cut_as_the_official_pipeline_cuts_them(name: str) -> None:
    frames, sizes, options, policy = CLIPS[name]
    found = sampled(stream_of(**policy), draw=draws(1), **{"frames": frames, **options})
    assert error(found, Official(**policy)(draws(1), frames, sizes)) <= 1e-5


@pytest.mark.parametrize(("alone", "given", "sizes"), [(False, 3, [3, 3]), (True, 4, [3, 2])])
def test_given_frames_are_kept_as_they_are(alone: bool, given: int, sizes: list[int]) -> None:
    initial = latent_of(GEOMETRY, given, 8)
    chunks = list(
        sample_stream(stream_of(), draw=draws(2), initial=initial, independent_first_frame=alone)
    )
    frames = np.swapaxes(initial[0], 0, 1)
    # Given frames are cut as a video is that begins with them.
    official = Official()
    start = 0
    for part in np.split(frames, np.cumsum(cut(given, 3, alone))[:-1]):
        official.velocity(part, 0.0, start)
        start += len(part)
    expected = official(draws(2), sum(sizes), sizes, start)
    found = joined([c.latent for c in chunks])
    assert np.array_equal(found[:, :, :given], initial)
    assert error(np.swapaxes(found[0], 0, 1)[given:], expected) <= 1e-5
    assert [c.is_given for c in chunks] == [True] * (2 if alone else 1) + [False] * 2
    assert [c.position for c in chunks] == ([0, 1, 4, 7] if alone else [0, 3, 6])


def test_the_table_is_the_official_one_to_the_bit() -> None:
    """FlowMatchScheduler(shift=5, sigma_min=0, extra_one_step=True) with warp_denoising_step."""
    s = torch.linspace(1.0, 0.0, 1001)[:-1]
    s = 5.0 * s / (1 + 4.0 * s)
    table = torch.cat([s * 1000, torch.zeros(1)])
    steps = torch.tensor([1000, 750, 500, 250])
    times = table[1000 - steps]
    own = steps_of(stream_of().denoiser.sampling.timesteps)
    assert [t for t, _ in own] == times.tolist()
    assert [f"{t:.4f}" for t, _ in own] == ["1000.0000", "937.5000", "833.3333", "625.0000"]
    for (_, sigma), time in zip(own, times, strict=True):
        assert sigma == s[(table[:-1] - time).abs().argmin()].item()
    assert [f"{sigma:.7f}" for _, sigma in own] == [
        "1.0000000",
        "0.9375000",
        "0.8333333",
        "0.6250000",
    ]


def test_the_order_of_random_numbers_is_the_official_one() -> None:
    asked: list[tuple[int, ...]] = []

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        asked.append(shape)
        return draws(0)(shape)

    sampled(stream_of(), draw=draw, frames=7, independent_first_frame=True)
    of_chunks = [[(f, 16, 4, 6)] * 3 for f in (1, 3, 3)]
    assert asked == [(7, 16, 4, 6), *(shape for own in of_chunks for shape in own)]


def test_a_seed_is_numpys_and_noise_stands_for_the_first_draw(whole: np.ndarray) -> None:
    assert np.array_equal(sampled(stream_of(), seed=3), whole)
    draw = draws(3)
    noise = np.swapaxes(draw((9, 16, 4, 6)), 0, 1)[None]
    assert np.array_equal(sampled(stream_of(), noise=noise, draw=draw), whole)
    assert not np.array_equal(sampled(stream_of(), seed=4), whole)


def test_tensors_give_what_arrays_give(whole: np.ndarray) -> None:
    denoiser, _ = causal_denoiser(GEOMETRY, torch_arrays=True)
    drawn = draws(3)
    chunks = list(
        sample_stream(denoiser.stream(text_of()), draw=lambda s: torch.from_numpy(drawn(s)))
    )
    assert all(isinstance(chunk.latent, torch.Tensor) for chunk in chunks)
    assert error(np.swapaxes(joined([c.latent for c in chunks])[0], 0, 1), whole) <= 1e-6


def test_the_clean_latent_is_computed_in_fp64_and_noise_in_fp32() -> None:
    rng = np.random.default_rng(0)
    latent, velocity = rng.standard_normal((2, 1, 16, 3, 4, 6), np.float32)
    expected = (latent.astype(np.float64) - 0.9375 * velocity.astype(np.float64)).astype(np.float32)
    assert np.array_equal(module._clean(latent, velocity, 0.9375), expected)
    tensors = module._clean(torch.from_numpy(latent), torch.from_numpy(velocity), 0.9375)
    assert np.array_equal(tensors.numpy(), expected)
    stream, fresh = stream_of(), draws(5)((3, 16, 4, 6))
    loop = module._Loop(stream, [], lambda shape: fresh, None)
    sigma = steps_of([833.3333])[0][1]
    clean = torch.from_numpy(latent)
    official = (1 - torch.tensor(sigma)) * clean + torch.tensor(sigma) * torch.from_numpy(
        fresh
    ).transpose(0, 1)
    assert np.array_equal(loop._noised(latent, sigma), official.numpy())


def test_a_stream_goes_on_where_a_loop_ended() -> None:
    stream = stream_of()
    first = list(sample_stream(stream, frames=3, seed=1))
    assert [c.position for c in first] == [0] and stream.position == 3
    rest = list(sample_stream(stream, seed=2, independent_first_frame=True))  # of the clip
    assert [(c.position, c.latent.shape[2]) for c in rest] == [(3, 3), (6, 3)]


def test_steps_are_told_as_they_end() -> None:
    told: list[ChunkStep] = []
    chunks = list(sample_stream(stream_of(), frames=6, on_step=told.append))
    assert [(s.chunk, s.index) for s in told] == [(c, i) for c in range(2) for i in range(4)]
    assert [s.timestep for s in told[:4]] == [t for t, _ in steps_of(TIMES)]
    assert np.array_equal(told[7].latent, chunks[1].latent)


@pytest.mark.parametrize(
    ("frames", "chunk", "alone", "sizes"),
    [(9, 3, False, [3, 3, 3]), (7, 3, True, [1, 3, 3]), (8, 3, False, [3, 3, 2]), (1, 3, True, [1]),
     (2, 3, False, [2]), (3, 1, True, [1, 1, 1])],
)  # fmt: skip
def test_frames_are_cut_into_chunks(frames: int, chunk: int, alone: bool, sizes: list[int]) -> None:
    assert cut(frames, chunk, alone) == sizes


def refused() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"frames": 0}, "frames is 0: expected how many latent frames are made, 1 or more"
    yield {"frames": 2.5}, "frames is 2.5"
    yield {"frames": 12}, "cache of 9 frames is full at frame 9: give a window"
    yield {"noise": np.zeros((1, 16, 9, 4, 4))}, r"noise has shape .*, expected \[1, 16, 9, 4, 6\]"
    yield {"noise": np.zeros((1, 16, 9, 4, 6)), "frames": 6}, r"expected \[1, 16, 6, 4, 6\]"
    yield {"noise": 7}, "frames is None"
    yield {"initial": np.zeros((1, 16, 3, 4, 4))}, "initial has shape"
    yield {"initial": np.zeros((16, 3, 4, 6))}, "initial has shape"
    yield {"initial": np.zeros((1, 16, 9, 4, 6))}, "frames is 0"
    yield {"seed": -1}, "seed is -1"
    yield {"draw": lambda shape: 0}, r"what draw gave has shape \[1\], expected \[9, 16, 4, 6\]"
    for wrong in (
        [],
        [625.0, 1000.0],
        [1000.0, 0.0],
        [1001.0],
        "1000",
        [1000.0, float("nan")],
        7.0,
    ):
        yield {"timesteps": wrong}, "timesteps are .*: expected numbers that fall from at most 1000"


@pytest.mark.parametrize(("options", "said"), list(refused()))
def test_what_does_not_fit_is_refused_before_any_work(options: dict[str, Any], said: str) -> None:
    denoiser, engine = causal_denoiser(GEOMETRY)
    with pytest.raises(BadRequest, match=said):
        sample_stream(denoiser.stream(text_of()), **options)
    assert not engine.calls
