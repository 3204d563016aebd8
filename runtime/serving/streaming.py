"""One prompt's causal video in the pipeline's thread, handed chunk by chunk to who asked."""

import time
from collections import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, Full, Queue
from typing import TypedDict

import numpy as np

from wanexport.runtime.arrays import Array, concatenated, is_finite, to_numpy
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import TEMPORAL_STRIDE, latent_count, nearest_frames
from wanexport.runtime.parts.protocols import VideoCodec
from wanexport.runtime.sample_stream import Chunk, OnChunkStep, sample_stream
from wanexport.runtime.serving.finished import not_finite
from wanexport.runtime.serving.generator import Generator, computing
from wanexport.runtime.serving.jobs import Check, Job, JobQueue
from wanexport.runtime.serving.request import check_texts

_AHEAD = 2  # chunks that may wait for who takes them
_PATIENCE = 0.1  # seconds between two looks at whether anyone still waits


class StreamKeywords(TypedDict, total=False):
    """The keywords of a stream; `Pipeline.stream` says what each means."""

    seed: int
    length: int | None
    window: int | None
    sink: int
    max_attention: int | None
    independent_first_frame: bool
    timesteps: Sequence[float] | None
    initial: Array | None
    noise: Array | None
    weights: str | None
    decode: bool
    on_step: OnChunkStep | None


@dataclass(frozen=True, eq=False)
class VideoOptions:
    """How a stream's video is made; `Pipeline.stream` says what each means."""

    seed: int = 0
    length: int | None = None
    window: int | None = None
    sink: int = 0
    max_attention: int | None = None
    independent_first_frame: bool = False
    timesteps: Sequence[float] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamRequest(VideoOptions):
    """What a stream is asked for."""

    prompt: str | Array
    initial: Array | None = None
    noise: Array | None = None
    weights: str | None = None
    decode: bool = True
    on_step: OnChunkStep | None = None


def make_stream_request(prompt: str | Array, asked: StreamKeywords) -> StreamRequest:
    """The request that keywords make. Raises BadRequest for a prompt or name that is none."""
    if not isinstance(prompt, str) and not hasattr(prompt, "shape"):
        raise BadRequest(f"prompt is {prompt!r:.40}: expected text, or its embeddings")
    check_texts("", weights=asked.get("weights"))
    return StreamRequest(prompt=prompt, **asked)


@dataclass(frozen=True, eq=False)
class StreamedChunk:
    """What a stream gives at a time.

    latent [1, 16, f, h, w] is fp32, of the latent frames from `position` on; frames [n, H, W, 3]
    are uint8, those that have become known: n may be 0, and where the VAE does not stream, all come
    with an empty latent at the end. seconds are those since the chunk before.
    """

    index: int
    position: int
    latent: np.ndarray
    frames: np.ndarray
    is_given: bool
    seconds: float


Chunks = abc.Generator[StreamedChunk, None, None]  # which who leaves it can close


def latent_frames(length: int | None) -> int | None:
    """The latent frames of so many frames. Raises BadRequest unless they are 4k+1."""
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise BadRequest(f"length is {length!r:.40}: expected a number of frames, 4k+1")
    if (length - 1) % TEMPORAL_STRIDE:
        low, high = nearest_frames(length)
        raise BadRequest(
            f"a length of {length} frames is not legal: expected 4k+1, {low} or {high}"
        )
    return latent_count(length)


def stream_chunks(
    generator: Generator, request: StreamRequest, check: Check
) -> Iterator[StreamedChunk]:
    """A request's chunks, in the thread that iterates; check is called between steps.

    Raises BadRequest for a request that does not fit, BundleError when a part is missing, and
    EngineFailure for NaN or Inf in a chunk.
    """
    denoiser = generator.denoiser
    frames = latent_frames(request.length)
    text = generator.text_of(request.prompt, request.weights, decode=request.decode)
    check()

    def on_step(step: object) -> None:
        if request.on_step is not None:
            request.on_step(step)  # type: ignore[arg-type]
        check()

    with computing(generator.gpu):
        stream = denoiser.stream(
            text, window=request.window, sink=request.sink, max_attention=request.max_attention
        )
        chunks = sample_stream(
            stream, frames=frames, seed=request.seed, initial=request.initial,
            noise=request.noise, timesteps=request.timesteps, on_step=on_step,
            independent_first_frame=request.independent_first_frame,
        )  # fmt: skip
    vae = generator.parts.vae() if request.decode else None
    yield from _streamed(_computed(chunks, generator.gpu), _Decoder(vae), generator)


def _computed(chunks: Iterator[Chunk], gpu: int | None) -> Iterator[Chunk]:
    """The chunks, each made without autograd and on the engine's GPU; none of it lasts while who
    takes them does something else."""
    while True:
        with computing(gpu):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _streamed(
    chunks: Iterator[Chunk], decoder: "_Decoder", generator: Generator
) -> Iterator[StreamedChunk]:
    began, index, position, latent = time.perf_counter(), 0, 0, None
    for chunk in chunks:
        with computing(generator.gpu):
            if not is_finite(chunk.latent):
                raise not_finite(generator.denoiser.record.name, f"chunk {chunk.index}")
            frames = decoder.decode(chunk.latent)
            latent = np.array(to_numpy(chunk.latent))
        now = time.perf_counter()
        index, position = chunk.index, chunk.position
        yield StreamedChunk(index, position, latent, frames, chunk.is_given, now - began)
        began = time.perf_counter()
    with computing(generator.gpu):
        frames = decoder.finish()
    if len(frames) and latent is not None:
        end = position + latent.shape[2]
        seconds = time.perf_counter() - began
        yield StreamedChunk(index + 1, end, latent[:, :, :0], frames, False, seconds)


class _Decoder:
    """Frames of latents as they come: from a session of the bundle's VAE engine, or whole at the
    end of a VAE that has none."""

    def __init__(self, vae: VideoCodec | None) -> None:
        begin: Callable[[], object] | None = getattr(vae, "session", None)
        self._vae = vae
        self._session = begin() if begin is not None else None
        self._waiting: list[Array] = []

    def decode(self, latent: Array) -> np.ndarray:
        """The frames that have become known."""
        if self._session is not None:
            return _on_host(self._session.decode(latent))  # type: ignore[attr-defined]
        if self._vae is not None:
            self._waiting.append(latent)
        return _NO_FRAMES

    def finish(self) -> np.ndarray:
        """The frames that are left."""
        if self._session is not None:
            return _on_host(self._session.finish())  # type: ignore[attr-defined]
        if self._vae is None or not self._waiting:
            return _NO_FRAMES
        return self._vae.decode(concatenated(self._waiting, axis=2))


_NO_FRAMES = np.zeros((0, 0, 0, 3), np.uint8)


def _on_host(frames: Array) -> np.ndarray:
    found: np.ndarray = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
    return found


def handed_over(queue: JobQueue, work: Callable[[Check], Iterator[StreamedChunk]]) -> Chunks:
    """What work gives in the queue's thread, in the caller's; leaving it cancels the work.

    The work waits while two chunks are not taken. Raises what the work raises.
    """
    chunks: Queue[StreamedChunk] = Queue(_AHEAD)
    job = queue.submit(partial(_fill, chunks, work))
    try:
        while True:
            is_last = job.done()
            try:
                chunk = chunks.get(timeout=_PATIENCE)
            except Empty:
                if is_last:
                    break
                continue
            yield chunk
        job.result()
    finally:
        _leave(job)


def _fill(
    chunks: Queue[StreamedChunk], work: Callable[[Check], Iterator[StreamedChunk]], check: Check
) -> None:
    for chunk in work(check):
        while True:
            check()
            try:
                chunks.put(chunk, timeout=_PATIENCE)
                break
            except Full:
                continue


def _leave(job: Job[None]) -> None:
    """Cancel a job that nobody waits for any more."""
    if not job.done():
        job.cancel()
