"""`wanexport stream`: a causal model's video, written chunk by chunk, and its record."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.exporter.run.record import (
    absolute,
    cost_of,
    engine_in_full,
    engine_words,
    own_weights,
)
from wanexport.exporter.run.request import RunRequest, check_request
from wanexport.exporter.run.run import (
    Show,
    component_facts,
    file_facts,
    saving_the_latent,
    write_record,
)
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BadRequest, needing_extra
from wanexport.runtime.sample_stream import ChunkStep, steps_of
from wanexport.runtime.serving.pipeline import Pipeline, StreamedChunk
from wanexport.runtime.serving.streaming import VideoOptions

_LATENT, _TEXT, _NOISE = "latent", "text", "noise"


@dataclass(frozen=True)
class StreamRequest:
    """What `stream` is asked for. Exactly one of prompt and text_file is given.

    initial is a file of latent frames that come before, as `run` and `stream` write them.
    """

    bundle: Path
    output: Path
    prompt: str | None = None
    text_file: Path | None = None
    initial: Path | None = None
    model: str | None = None
    overwrite: bool = False
    video: VideoOptions = field(default_factory=VideoOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)

    @property
    def as_run(self) -> RunRequest:
        """The run that reads and writes the same files."""
        return RunRequest(
            self.bundle, self.output, self.prompt, self.text_file, model=self.model,
            overwrite=self.overwrite, engine=self.engine,
        )  # fmt: skip


def stream(request: StreamRequest, *, show: Show, tell: Callable[[str], None]) -> dict[str, Any]:
    """Make the video and write it as it comes, and beside it the record that is returned.

    The file appears when it is whole. When something fails after a chunk, the latent so far is
    saved, and the error or tell says where.
    Raises WanExportError for what does not fit together, and as `load` and `Pipeline.stream` do.
    """
    run = request.as_run
    check_request(run)
    if run.makes_video:  # not after the first chunk
        with needing_extra("pipeline", "an .mp4 file"):
            import av  # noqa: F401
    show("opening the engine", 0, 0)
    started = time.monotonic()
    with Pipeline(
        request.bundle, model=request.model, keep_text_encoder=False, **request.engine.given()
    ) as pipeline:
        denoiser = pipeline.denoiser
        refuse_whole(denoiser)
        opened = time.monotonic() - started
        facts = _facts(request, denoiser, tell)
        made = _Made(show, _steps(request, denoiser))
        with saving_the_latent(request.output, made, tell):
            _write(request, denoiser, made.watched(_chunks(request, pipeline, made.told)))
        record = _record(request, denoiser, made, facts | {"load_seconds": round(opened, 3)})
    return write_record(request.output, record)


def refuse_whole(denoiser: Denoiser) -> None:
    """Raise BadRequest for a model that is not causal."""
    if not denoiser.geometry.chunk:
        raise BadRequest(
            f"engine {denoiser.record.name} makes a video whole: use wanexport run, or build a "
            f"causal model's engine (--family self-forcing)"
        )


class _Made:
    """The chunks that there are, and the progress that is shown."""

    def __init__(self, show: Show, steps: int) -> None:
        self.latents: list[np.ndarray] = []
        self.seconds: list[float] = []
        self.frames = 0
        self._show, self._steps = show, steps

    @property
    def latent(self) -> np.ndarray | None:
        """All latent frames so far."""
        return np.concatenate(self.latents, axis=2) if self.latents else None

    def told(self, step: ChunkStep) -> None:
        """Show a finished step."""
        pace = f", {self.seconds[-1]:.2f} s a chunk" if self.seconds else ""
        self._show(f"chunk {step.chunk}{pace}", step.index + 1, self._steps)

    def watched(self, chunks: Iterator[StreamedChunk]) -> Iterator[StreamedChunk]:
        """The chunks, of which the latents and times are kept."""
        for chunk in chunks:
            if chunk.latent.shape[2]:
                self.latents.append(chunk.latent)
                self.seconds.append(round(chunk.seconds, 4))
            self.frames += len(chunk.frames)
            yield chunk


def _steps(request: StreamRequest, denoiser: Denoiser) -> int:
    times = request.video.timesteps
    return len(steps_of(denoiser.sampling.timesteps if times is None else times))


def _facts(
    request: StreamRequest, denoiser: Denoiser, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Where the parts come from. Raises WanExportError for one that is missing, before any work."""
    needs = (["text_encoder"] if request.prompt is not None else []) + (
        ["vae"] if request.as_run.makes_video else []
    )
    components = component_facts(request.as_run, denoiser, needs, tell) if needs else {}
    return {
        "prompt": request.prompt,
        "text": file_facts(request.text_file),
        "initial": file_facts(request.initial),
        **components,
    }


def _chunks(
    request: StreamRequest, pipeline: Pipeline, on_step: Callable[[ChunkStep], object]
) -> Iterator[StreamedChunk]:
    arrays = {} if request.text_file is None else _arrays(request.text_file)
    initial = None if request.initial is None else _initial(request.initial)
    return pipeline.stream(
        arrays[_TEXT] if request.prompt is None else request.prompt,
        noise=arrays.get(_NOISE),
        initial=initial,
        decode=request.as_run.makes_video,
        on_step=on_step,
        **asdict(request.video),
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The text embeddings of a file, and its noise if any. Raises BadRequest for another file."""
    arrays = load_arrays(path)
    if _TEXT not in arrays or arrays.keys() - {_TEXT, _NOISE, "negative"}:
        raise BadRequest(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected text, and noise if it is "
            f"given"
        )
    return arrays


def _initial(path: Path) -> np.ndarray:
    """The latent of a file that `run` or `stream` wrote. Raises BadRequest for another file."""
    arrays = load_arrays(path)
    if list(arrays) != [_LATENT]:
        raise BadRequest(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected a latent, as run and stream "
            f"write it with -o X.safetensors"
        )
    return arrays[_LATENT]


def _write(request: StreamRequest, denoiser: Denoiser, chunks: Iterator[StreamedChunk]) -> None:
    """The video frame by frame, or the latent."""
    if request.as_run.makes_video:
        from wanexport.runtime.serving.video import write_chunks

        parts = (chunk.frames for chunk in chunks if len(chunk.frames))
        write_chunks(request.output, parts, denoiser.sampling.fps)
        return
    latents = [chunk.latent for chunk in chunks]
    save_arrays(request.output, {_LATENT: np.concatenate(latents, axis=2)})


def _record(
    request: StreamRequest, denoiser: Denoiser, made: _Made, facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything that repeating the stream takes, and what it cost."""
    engine, geometry, latent = denoiser.record, denoiser.geometry, made.latent
    assert latent is not None
    times = request.video.timesteps or list(denoiser.sampling.timesteps or ())
    return {
        "output": str(request.output),
        "command": shlex.join(_command(request, denoiser)),
        "bundle": str(request.bundle.resolve()),
        "engine": engine.name,
        "key": engine.key,
        "weights": own_weights(request.bundle, denoiser),
        "shape": list(latent.shape),
        "height": geometry.height,
        "width": geometry.width,
        "frames": made.frames,
        "fps": engine.sampling.fps,
        **asdict(request.video),
        "timesteps": times,
        **facts,
        "chunk_seconds": made.seconds,
        **cost_of(),
    }


def _command(request: StreamRequest, denoiser: Denoiser) -> list[str]:
    """The command line that repeats the stream, with everything said that was left open."""
    video = request.video
    times = video.timesteps
    options = {
        "--prompt": request.prompt,
        "--text": absolute(request.text_file),
        "--initial": absolute(request.initial),
        "--model": absolute(request.model),
        "--seed": video.seed,
        "--length": video.length,
        "--window": video.window,
        "--sink": video.sink or None,
        "--max-attention": video.max_attention,
        "--timesteps": None if times is None else ",".join(map(repr, times)),
        "--output": absolute(request.output),
    }
    words = ["wanexport", "stream", str(request.bundle.resolve())]
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    words += ["--independent-first-frame"] if video.independent_first_frame else []
    return [*words, *engine_words(engine_in_full(request.as_run, denoiser)), "--overwrite"]
