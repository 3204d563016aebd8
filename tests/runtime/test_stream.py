"""A stream keeps its video whole: steps repeat, chunks are left, videos meet nowhere."""

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.causal_stream import CONFIG, random_weights
from tests.oracles.causal_oracle import CausalOracle
from tests.oracles.plain_wan64 import as_fp64
from tests.quick import slow_but
from tests.runtime.causal_engine import (
    STYLE,
    causal_denoiser,
    geometry_of,
    latent_of,
    text_of,
)
from tests.runtime.test_denoiser import denoiser as plain_denoiser
from tests.tables.published.causal_cache import Host
from tests.tables.published.causal_chunks import Sampler, chunks
from tests.tables.published.host_waits import SMALL as SMALL_MODEL
from tests.tables.published.host_waits import causal_model
from wanexport.runtime.errors import BadRequest, EngineFailure
from wanexport.runtime.machine.memory import peak_rss
from wanexport.runtime.sample_stream import sample_stream
from wanexport.runtime.stream import Stream

LARGE = geometry_of(12)
SMALL = geometry_of(12, cache=7)
WINDOW = {"window": 7, "sink": 1}
TIMES = (1000.0, 625.0)


def opened(geometry: Any = SMALL, **policy: Any) -> Stream:
    return causal_denoiser(geometry)[0].stream(text_of(), **(policy or WINDOW))


def chunk(stream: Stream, frames: int, seed: int) -> list[np.ndarray]:
    """Two steps of the next chunk on random latents, and its commit: the velocities."""
    latents = [latent_of(stream.geometry, frames, 10 * seed + i) for i in range(3)]
    velocities = [stream.step(latent, t) for latent, t in zip(latents, TIMES)]
    stream.commit(latents[2])
    return velocities


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


POLICIES = {
    "everything": (LARGE, {}, [3, 3, 3, 3]),
    "a window with a sink": (SMALL, WINDOW, [3] * 6),
    "a first chunk of one frame": (SMALL, WINDOW, [1, 3, 3, 3]),
    "less attention than is kept": (SMALL, {"window": 9, "sink": 1, "max_attention": 5}, [3] * 5),
    "chunks of any length": (SMALL, WINDOW, [2, 3, 1, 3, 3, 2]),
    "attention to less than a chunk": (SMALL, {"max_attention": 2}, [3, 3, 3]),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("torch_arrays", [False, True])
def test_velocities_are_those_of_the_official_rules(name: str, torch_arrays: bool) -> None:
    geometry, policy, sizes = POLICIES[name]
    denoiser, _ = causal_denoiser(geometry, torch_arrays=torch_arrays)
    stream = denoiser.stream(text_of(), **policy)
    oracle = CausalOracle(
        as_fp64(random_weights(CONFIG)), 2, 3, CONFIG.num_heads, CONFIG.num_layers,
        torch.from_numpy(text_of()).double(), CONFIG.text_len, **policy,
    )  # fmt: skip
    for number, frames in enumerate(sizes):
        times = np.linspace(1000, 900, frames, dtype=np.float32)
        of_steps: tuple[Any, ...] = (times, 625.0)
        for seed, given in enumerate(of_steps):
            latent = latent_of(geometry, frames, 10 * number + seed)
            velocity = stream.step(latent, given)
            expected = oracle.velocity(
                torch.from_numpy(latent[0]).double(), np.broadcast_to(given, frames).tolist(),
                stream.position,
            )  # fmt: skip
            assert isinstance(velocity, np.ndarray) and velocity.shape == latent.shape
            error = np.linalg.norm(velocity[0] - expected.numpy()) / np.linalg.norm(expected)
            assert error <= 1e-5
        stream.commit(latent)
        oracle.velocity(
            torch.from_numpy(latent[0]).double(), [0.0] * frames, stream.position - frames
        )
    assert stream.position == sum(sizes)


def test_the_place_of_a_chunk_goes_to_the_engine_once() -> None:
    denoiser, engine = causal_denoiser(SMALL)
    stream = denoiser.stream(text_of(), **WINDOW)
    for _ in range(3):
        chunk(stream, 3, 0)
    assert engine.calls == ["step", "prompt", "step", "commit", *["step", "step", "commit"] * 2]
    places = [[given[n] for n in ("position", "slots", "keys")] for given in engine.given]
    for i in (0, 3, 6):
        assert all(a is b is c for a, b, c in zip(*places[i : i + 3]))
    assert [given["position"].tolist() for given in engine.given[::3]] == [[0], [3], [6]]
    assert [given["keys"].tolist() for given in engine.given[::3]] == [[18], [36], [42]]
    assert all(given["attended"] == given["keys"][0] for given in engine.given)
    assert all(part.dtype == np.int64 for place in places for part in place)


@pytest.mark.parametrize("leave", [lambda stream: None, lambda stream: stream.rewind(0)])
def test_a_chunk_that_was_left_can_be_made_again_to_the_bit(leave: Callable[..., Any]) -> None:
    straight, stream = opened(), opened()
    for number in range(6):
        for seed in (77, 78):  # other latents, of which one step is the last before the user left
            stream.step(latent_of(SMALL, 3, seed), 937.5)
        leave(stream)
        assert equal(chunk(stream, 3, number), chunk(straight, 3, number))


def test_a_loop_that_was_cancelled_goes_on_to_the_bit() -> None:
    class Left(Exception):
        pass

    def leave(step: Any) -> None:
        if (step.chunk, step.index) == (1, 2):
            raise Left

    straight, stream = opened(), opened()
    whole = [c.latent for c in sample_stream(straight, frames=9, seed=3)]
    cut = sample_stream(stream, frames=9, seed=3, on_step=leave)
    assert np.array_equal(next(cut).latent, whole[0])
    with pytest.raises(Left):
        next(cut)
    assert stream.position == 3
    stream.reset()
    assert equal([c.latent for c in sample_stream(stream, frames=9, seed=3)], whole)


@pytest.mark.parametrize("moment", ["step", "commit"])
def test_a_call_that_failed_leaves_the_video_where_it_was(moment: str) -> None:
    straight = opened()
    denoiser, engine = causal_denoiser(SMALL)
    stream = denoiser.stream(text_of(), **WINDOW)
    for number in range(4):
        engine.fails = moment
        with pytest.raises(EngineFailure, match="asked to fail"):
            chunk(stream, 3, 50 + number)
        engine.fails = ""
        assert stream.position == 3 * number
        assert equal(chunk(stream, 3, number), chunk(straight, 3, number))


def test_two_videos_of_one_engine_do_not_meet() -> None:
    denoiser, _ = causal_denoiser(SMALL)
    texts, policies = (text_of(0), text_of(5)), (WINDOW, {"max_attention": 4})
    alone = []
    for seed, (text, policy) in enumerate(zip(texts, policies)):
        stream = denoiser.stream(text, **policy)
        alone.append([chunk(stream, 3, 9 * seed + i) for i in range(4)])
    both = [denoiser.stream(text, **policy) for text, policy in zip(texts, policies)]
    for i in range(4):
        for seed, stream in enumerate(both):
            assert equal(chunk(stream, 3, 9 * seed + i), alone[seed][i])


def test_a_rewound_video_goes_on_as_if_it_had_stopped_there() -> None:
    straight, stream = (opened(LARGE, window=None) for _ in range(2))
    first = [chunk(stream, 3, i) for i in range(4)]
    assert equal(first[0], chunk(straight, 3, 0))
    stream.rewind(9)
    assert stream.position == 3 and stream.frames == (0, 1, 2)
    for i in (7, 8, 9):
        assert equal(chunk(stream, 3, i), chunk(straight, 3, i))
    with pytest.raises(BadRequest, match=r"cannot rewind by 4 frames, .*: expected 0, 3, 6, 9"):
        stream.rewind(4)


def test_the_last_chunk_behind_a_full_window_can_be_made_again_and_no_earlier_one() -> None:
    straight, stream = opened(), opened()
    for i in range(5):
        chunk(stream, 3, i)
        chunk(straight, 3, i)
    chunk(stream, 3, 99)
    stream.rewind(3)
    assert equal(chunk(stream, 3, 6), chunk(straight, 3, 6))
    with pytest.raises(BadRequest, match="whose slot another chunk has taken"):
        stream.rewind(6)
    assert equal(chunk(stream, 3, 7), chunk(straight, 3, 7))


def test_a_reset_begins_a_video_that_knows_nothing_of_the_one_before() -> None:
    fresh, stream = opened(), opened()
    expected = [chunk(fresh, 3, i) for i in range(3)]
    stream.step(np.full_like(latent_of(SMALL, 3), 1e30), 1000.0)  # whose keys are inf and NaN
    stream.commit(np.full_like(latent_of(SMALL, 3), 1e30))
    stream.reset()
    assert stream.position == 0 and stream.frames == ()
    assert all(state.isfinite().all() for state in stream._memory.state.values())
    assert all(equal(chunk(stream, 3, i), expected[i]) for i in range(3))
    stream.reset(text_of(5))
    other = chunk(stream, 3, 0)
    assert not equal(other, expected[0])
    stream.reset(text_of(0))
    assert equal(chunk(stream, 3, 0), expected[0])


def test_a_text_that_does_not_fit_leaves_the_video_as_it_was() -> None:
    stream, straight = opened(), opened()
    chunk(stream, 3, 0)
    chunk(straight, 3, 0)
    with pytest.raises(BadRequest, match="13 rows, the model takes at most 12"):
        stream.reset(np.zeros((13, 20)))
    with pytest.raises(BadRequest, match="text has shape"):
        stream.reset(np.zeros((2, 7)))
    with pytest.raises(BadRequest, match=r"text has .* NaN"):
        stream.reset(np.full((2, 20), np.nan))
    assert stream.position == 3
    assert equal(chunk(stream, 3, 1), chunk(straight, 3, 1))


def test_weights_that_change_in_the_middle_of_a_video_are_refused() -> None:
    denoiser, _ = causal_denoiser(SMALL)
    stream = denoiser.stream(text_of(), **WINDOW)
    first = chunk(stream, 3, 0)
    denoiser.use(STYLE)
    for call in (stream.step, stream.commit):
        with pytest.raises(BadRequest, match="weights became style in the middle of this video"):
            call(latent_of(SMALL, 3), 0.0)
    denoiser.use(None)
    straight = opened()
    chunk(straight, 3, 0)
    assert equal(chunk(stream, 3, 1), chunk(straight, 3, 1))
    denoiser.use(STYLE)
    stream.reset()
    own = chunk(stream, 3, 0)
    assert not equal(own, first)
    assert equal(own, chunk(denoiser.stream(text_of(), **WINDOW), 3, 0))


@pytest.mark.parametrize(
    ("latent", "timestep", "said"),
    [
        (latent_of(SMALL, 4), 1.0, r"latent has shape \[1, 16, 4, 4, 6\], .* takes \[1, 16, 3"),
        (latent_of(SMALL, 3)[0], 1.0, "latent has shape"),
        (latent_of(geometry_of(3), 3)[:, :, :0], 1.0, "latent has shape"),
        (latent_of(SMALL, 3), 1000.5, "expected from 0 to 1000"),
        (latent_of(SMALL, 3), np.zeros(2), "timestep has shape"),
        (latent_of(SMALL, 2), np.zeros(3), "timestep has shape"),
        (np.full((1, 16, 3, 4, 6), np.nan), 1.0, "latent has .* NaN or Inf"),
        ("latent", 1.0, "str is no array of numbers"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    latent: Any, timestep: Any, said: str
) -> None:
    stream, straight = opened(), opened()
    for call in (stream.step, stream.commit):
        with pytest.raises(BadRequest, match=said):
            call(latent, timestep)
    assert equal(chunk(stream, 3, 0), chunk(straight, 3, 0))


def test_a_full_cache_is_one_line() -> None:
    stream = opened(geometry_of(6), window=None)
    for number in range(2):
        chunk(stream, 3, number)
    with pytest.raises(BadRequest, match="cache of 6 frames is full at frame 6: give a window"):
        stream.step(latent_of(SMALL, 3), 1000.0)


def test_a_causal_engine_names_its_streams_and_another_has_none() -> None:
    denoiser, _ = causal_denoiser(SMALL)
    said = r"makes a video chunk by chunk: use denoiser.stream\(text\)"
    given = {"latent": latent_of(SMALL, 3), "timestep": 1.0, "text": text_of()}
    for call in (denoiser, denoiser.session):
        with pytest.raises(BadRequest, match=said):
            call(**given)
    with pytest.raises(BadRequest, match="a window of 3 frames does not hold a sink of 1"):
        denoiser.stream(text_of(), window=3, sink=1)
    with pytest.raises(BadRequest, match="makes a video whole: use sample"):
        plain_denoiser()[0].stream(np.ones((3, 4096)))


def operators_of(work: Callable[[], Any]) -> dict[str, int]:
    """How often each operator of PyTorch ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return {event.key: event.count for event in profiler.key_averages()}


@pytest.mark.parametrize("window", slow_but([None, 7], 7))
def test_no_step_reads_a_number_from_a_tensor(window: int | None) -> None:
    """Where a literal implementation reads several a layer."""
    denoiser, _ = causal_denoiser(LARGE, torch_arrays=True)
    stream = denoiser.stream(text_of(), window=window)
    latent = torch.from_numpy(latent_of(LARGE, 3))
    for _ in range(2):
        stream.step(latent, 1000.0)
        stream.commit(latent)

    def step_and_commit() -> None:
        stream.step(latent, 625.0)
        stream.commit(latent)

    ran = operators_of(step_and_commit)
    assert ran["aten::index_copy_"] == 4 * CONFIG.num_layers
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"} & ran.keys()
    size = replace(SMALL_MODEL["cpu"], layers=2)
    model = causal_model(size, "cpu")
    literal = operators_of(lambda: chunks(model, Sampler(Host.READ), "cpu"))
    assert literal["aten::item"] >= 100


def peak_of(work: Callable[[], Any]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def streamed(stream: Stream, frames: int) -> None:
    """So many latent frames, in as many videos as the model's positions make of them."""
    while frames > 0:
        made = min(frames, 1023 - stream.position)
        for _ in sample_stream(stream, frames=made, timesteps=[1000.0]):
            pass
        frames -= made
        if stream.position >= 1023:
            stream.reset()


def test_memory_stays_flat_while_chunks_come() -> None:
    denoiser, engine = causal_denoiser(SMALL)
    stream = denoiser.stream(text_of(), **WINDOW)
    streamed(stream, 30)
    engine.given.clear()
    engine.calls.clear()

    def go_on() -> None:
        streamed(stream, 60)
        engine.given.clear()
        engine.calls.clear()

    grown = peak_of(go_on)
    assert grown < 60_000  # where the latents alone would be 92 kB


@pytest.mark.slow
def test_an_hour_of_video_takes_no_more_memory_than_a_minute() -> None:
    denoiser, engine = causal_denoiser(SMALL)
    stream = denoiser.stream(text_of(), **WINDOW)

    class Nothing(list[Any]):
        def append(self, _: Any) -> None: ...

    engine.given = engine.calls = Nothing()
    peaks = []
    for _ in range(15):  # 15 videos of 1023 latent frames, 4 frames each, at 16 a second
        streamed(stream, 1023)
        peaks.append(peak_rss())
    assert peaks[-1] - peaks[1] < 20e6
