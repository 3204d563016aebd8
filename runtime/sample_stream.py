"""The sampling loop of a causal video: each chunk in a few steps, then its commit.

It is that of Self-Forcing (guandeh17/Self-Forcing `pipeline/causal_inference.py`): a step gives the
clean latent, which is noised anew for the next one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from wanexport.runtime.arrays import Array, concatenated, is_torch, to_numpy
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.sample import Plan, Step
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS
from wanexport.runtime.stream import Stream

SOLVER = "renoise"  # of `solvers.SOLVERS`: what the loop does
Draw = Callable[[tuple[int, ...]], Array]  # standard normal numbers of a shape


@dataclass(frozen=True)
class Chunk:
    """A chunk that is committed: its number in this loop, the number of its first latent frame, and
    its latent [1, 16, f, h, w]. One that `is_given` was not sampled."""

    index: int
    position: int
    latent: Array
    is_given: bool


@dataclass(frozen=True)
class ChunkStep:
    """A finished step: the chunk's number, the step's, the timestep, and the clean latent that it
    gave; the last step's is the chunk's own."""

    chunk: int
    index: int
    timestep: float
    latent: Array


OnChunkStep = Callable[[ChunkStep], object]


def sample_stream(
    stream: Stream,
    *,
    frames: int | None = None,
    seed: int = 0,
    draw: Draw | None = None,
    noise: Array | None = None,
    initial: Array | None = None,
    independent_first_frame: bool = False,
    timesteps: Sequence[float] | None = None,
    on_step: OnChunkStep | None = None,
) -> Iterator[Chunk]:
    """Go on with a stream by so many latent frames, and yield each chunk once it is committed.

    frames is by default what is left of the engine's clip; the last chunk may be shorter than the
    others. initial [1, 16, f, h, w] are frames that come before: they are committed as they are,
    and yielded.
    With independent_first_frame the video's first chunk is one frame, as some models are trained.
    timesteps are by default the model's own: floats from 1000 on, each below the one before.

    Random numbers are those of `draw`, by default of numpy's PCG64 with the seed, in the official
    order: the noise of all frames [frames, 16, h, w], then for each step of a chunk but its last
    one [f, 16, h, w]. noise [1, 16, frames, h, w] stands for the first of these draws.

    on_step is called after every step; what it raises leaves the stream before the chunk, which
    may be sampled again. Raises BadRequest, before any work, for what does not fit.
    """
    steps = steps_of(stream.denoiser.sampling.timesteps if timesteps is None else timesteps)
    given = [] if initial is None else _chunks_of(stream, initial, independent_first_frame)
    left = stream.geometry.clip_frames - stream.position - sum(part.shape[2] for part in given)
    frames = _frames(left if frames is None and noise is None else frames, noise)
    is_first = independent_first_frame and not given and not stream.position
    sizes = cut(frames, stream.geometry.chunk, is_first)
    stream.check_room([*(part.shape[2] for part in given), *sizes])
    loop = _Loop(stream, steps, draw or _numbers(seed), on_step)
    whole = loop.noise(frames) if noise is None else loop.checked(noise, frames)
    return _chunks(loop, given, whole, sizes)


def sample_clip(
    denoiser: Denoiser,
    plan: Plan,
    *,
    text: Array,
    seed: int,
    on_step: Callable[[Step, int], object],
    noise: Array | None = None,
) -> Array:
    """The engine's whole clip [1, 16, F, h, w], as `sample` gives it of other models.

    on_step is called with each step, whose latent is all that is clean by then, and how many there
    are. Raises BadRequest for guidance or a solver that a causal model has not, and as
    `sample_stream` does.
    """
    if plan.solver != SOLVER or any(scale != 1 for scale in plan.guidance):
        raise BadRequest(
            f"engine {denoiser.record.name} samples with solver {SOLVER} and guidance 1: leave "
            f"--solver and --guidance out"
        )
    stream, done = denoiser.stream(text), list[Array]()
    geometry = stream.geometry
    count = len(plan) * len(cut(geometry.clip_frames, geometry.chunk, False))

    def told(step: ChunkStep) -> None:
        latent = concatenated([*done, step.latent], axis=2)
        on_step(Step(step.chunk * len(plan) + step.index, step.timestep, latent), count)

    times = plan.schedule.timesteps
    for chunk in sample_stream(stream, seed=seed, noise=noise, timesteps=times, on_step=told):
        done.append(chunk.latent)
    return concatenated(done, axis=2)


def steps_of(timesteps: Sequence[float] | None) -> list[tuple[float, float]]:
    """The timestep and the sigma of each step, both in fp32.

    The official table has sigmas s, which are an even grid moved by the shift, and timesteps
    1000 s: no timestep is cut to a whole number, and one sigma serves both the clean latent and
    the noise. Raises BadRequest for timesteps that do not fall from at most 1000 to above 0.
    """
    try:
        times = np.asarray([] if timesteps is None else timesteps, np.float32)
    except (TypeError, ValueError):
        times = np.zeros(0, np.float32)
    falls = times.ndim == 1 and times.size and bool((np.diff(times) < 0).all())
    if not falls or not 0 < times[-1] <= times[0] <= NUM_TRAIN_TIMESTEPS:
        raise BadRequest(
            f"timesteps are {printable(timesteps, 80)}: expected numbers that fall from at most "
            f"{NUM_TRAIN_TIMESTEPS} to above 0, as 1000, 937.5, 833.333, 625"
        )
    sigmas = times / np.float32(NUM_TRAIN_TIMESTEPS)
    return [(float(t), float(s)) for t, s in zip(times, sigmas)]


def cut(frames: int, chunk: int, first_alone: bool) -> list[int]:
    """The sizes of the chunks that so many frames are: all alike, but for a first and a last."""
    first = [1] if first_alone else []
    whole, rest = divmod(frames - len(first), chunk)
    return [*first, *[chunk] * whole, *([rest] if rest else [])]


@dataclass(frozen=True)
class _Loop:
    """What the chunks of a loop share."""

    stream: Stream
    steps: Sequence[tuple[float, float]]
    draw: Draw
    on_step: OnChunkStep | None

    def noise(self, frames: int) -> Array:
        """Numbers [f, C, h, w], as the official code draws them, as a latent [1, C, f, h, w]."""
        _, channels, _, height, width = self.stream.denoiser.record.output.shape
        drawn = self.draw((frames, channels, height, width))
        drawn = drawn if is_torch(drawn) else to_numpy(drawn)
        _check_shape("what draw gave", drawn, (frames, channels, height, width))
        if is_torch(drawn):
            return drawn.transpose(0, 1)[None]
        return np.ascontiguousarray(np.swapaxes(drawn, 0, 1))[None]

    def checked(self, noise: Array, frames: int) -> Array:
        """Noise that was given. Raises BadRequest unless it is of so many frames."""
        _check_shape("noise", noise, _shape(self.stream, frames))
        return noise

    def denoise(self, number: int, latent: Array) -> Iterator[ChunkStep]:
        """The steps of a chunk [1, 16, f, h, w] that begins as noise."""
        clean = latent
        for index, (timestep, sigma) in enumerate(self.steps):
            latent = self._noised(clean, sigma) if index else latent
            clean = _clean(latent, self.stream.step(latent, timestep), sigma)
            yield ChunkStep(number, index, timestep, clean)

    def _noised(self, clean: Array, sigma: float) -> Array:
        """(1 - sigma) clean + sigma noise, in fp32, with noise that is drawn now."""
        noise = self.stream.denoiser.array(self.noise(clean.shape[2]))
        return float(np.float32(1) - np.float32(sigma)) * clean + sigma * noise


def _chunks(
    loop: _Loop, given: Sequence[Array], noise: Array, sizes: Sequence[int]
) -> Iterator[Chunk]:
    stream, begin = loop.stream, 0
    for number, latent in enumerate(given):
        yield _committed(stream, number, latent, is_given=True)
    for number, count in enumerate(sizes, start=len(given)):
        own = stream.denoiser.array(noise[:, :, begin : begin + count])
        for step in loop.denoise(number, own):
            if loop.on_step is not None:
                loop.on_step(step)
        yield _committed(stream, number, step.latent, is_given=False)
        begin += count


def _committed(stream: Stream, number: int, latent: Array, *, is_given: bool) -> Chunk:
    latent, position = stream.denoiser.array(latent), stream.position
    stream.commit(latent, 0.0)
    return Chunk(number, position, latent, is_given)


def _clean(latent: Array, velocity: Array, sigma: float) -> Array:
    """latent - sigma velocity, in fp64, rounded to fp32."""
    if is_torch(latent):
        return (latent.double() - sigma * velocity.double()).float()
    wide = latent.astype(np.float64) - sigma * velocity.astype(np.float64)
    return wide.astype(np.float32)


def _numbers(seed: int) -> Draw:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise BadRequest(f"seed is {printable(seed, 40)}: expected a whole number of 0 or more")
    dice = np.random.default_rng(int(seed))
    return lambda shape: dice.standard_normal(shape, np.float32)


def _frames(frames: int | None, noise: Array | None) -> int:
    """How many latent frames are made: as many as the noise has where that is all that is said."""
    found = next(iter(getattr(noise, "shape", ())[2:3]), None) if frames is None else frames
    if isinstance(found, bool) or not isinstance(found, Integral) or found < 1:
        raise BadRequest(
            f"frames is {printable(found, 40)}: expected how many latent frames are made, 1 or more"
        )
    return int(found)


def _chunks_of(stream: Stream, initial: Array, first_alone: bool) -> list[Array]:
    """Given frames, cut as chunks are. Raises BadRequest for another shape than a latent's."""
    initial = initial if is_torch(initial) else to_numpy(initial)
    frames = initial.shape[2] if initial.ndim == 5 else 1
    _check_shape("initial", initial, _shape(stream, frames))
    sizes = cut(frames, stream.geometry.chunk, first_alone and not stream.position)
    ends = np.cumsum(sizes).tolist()
    return [initial[:, :, end - size : end] for size, end in zip(sizes, ends)]


def _shape(stream: Stream, frames: int) -> tuple[int, ...]:
    """Of a latent of so many frames."""
    _, channels, _, *sides = stream.denoiser.record.output.shape
    return (1, channels, frames, *sides)


def _check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if tuple(array.shape) != expected or 0 in expected:
        raise BadRequest(f"{name} has shape {list(array.shape)}, expected {list(expected)}")
