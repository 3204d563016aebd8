"""`compare` of a causal engine: every step of every chunk, and what each commit has kept.

The reference's stream follows Self-Forcing's loop. The engine and its floor are given the latents
that the reference was given, and keep what they make of them: so a fault of a commit shows in the
cache there and then, and in the steps of later chunks.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.peers import EXACT, Peers
from wanexport.exporter.compare.recorded import Loop
from wanexport.exporter.compare.request import CompareRequest
from wanexport.exporter.compare.rows import Compared, Row, Run, add_drift, row_of
from wanexport.exporter.compare.sessions import Call
from wanexport.exporter.reference.parity import Parity, difference, relative_l2
from wanexport.runtime.arrays import Array, is_finite, to_numpy
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.sample_stream import ChunkStep, sample_stream
from wanexport.runtime.stream import Stream

OF_STREAMS = ("chunks", "window", "sink", "max_attention")


def check_streamed(request: CompareRequest, geometry: Geometry, saves: bool) -> None:
    """Raise BadRequest for what is asked of an engine whose kind does not have it."""
    if not geometry.chunk:
        if given := [name for name in OF_STREAMS if getattr(request, name)]:
            option = given[0].replace("_", "-")
            raise BadRequest(f"--{option} is for causal engines, this one is none: leave it out")
        return
    others = {
        "--calls": request.calls,
        "--reference diffusers": request.reference != "graph",
        "--against": request.against,
        "--bisect": request.bisect,
        "--save-inputs and --save-outputs": saves,
    }
    if unfit := [name for name, value in others.items() if value]:
        raise BadRequest(
            f"a causal engine is compared with our graph, chunk by chunk: leave {unfit[0]} out"
        )


@dataclass(frozen=True)
class StreamRows:
    """A row for each step and commit, and how long calls of both sides took."""

    rows: list[Row]
    seconds: list[float]
    reference_seconds: list[float]

    @property
    def passed(self) -> bool:
        """Whether every step and commit did."""
        return all(row["passed"] for row in self.rows)


def stream_rows(
    engine: Denoiser, peers: Peers, given: Loop, request: CompareRequest, progress: Progress
) -> StreamRows:
    """A causal engine and eager PyTorch on the same latents, then the engine on its own."""
    policy = {name: getattr(request, name) for name in OF_STREAMS[1:]}

    def begin(denoiser: Denoiser) -> Stream:
        return denoiser.stream(given.inputs["text"], **policy)

    dtype = engine.record.dtype
    forced = _Forced(
        begin(peers.eager[EXACT]),
        {"engine": begin(engine)}
        | ({} if dtype == "fp32" else {"floor": begin(peers.eager["graph", dtype])})
        | ({} if peers.unrounded is None else {"unrounded": begin(peers.unrounded)}),
    )
    latents = _latents(forced, given, request, progress, "engine on the same inputs")
    own = forced.others["engine"]
    own.reset()
    moved = _latents(own, given, request, progress, "engine on its own")
    add_drift(forced.rows, Run([], latents), Run([], moved))
    return StreamRows(forced.rows, forced.seconds, forced.reference_seconds)


class _NotFinite(Exception):
    """A loop of its own that has come to NaN or Inf, and ends there."""


def _latents(
    stream: Any, given: Loop, request: CompareRequest, progress: Progress, stage: str
) -> list[np.ndarray]:
    """The clean latent after every step of a loop, and once more for the commit of each chunk."""
    size, found = stream.geometry, list[np.ndarray]()
    frames = None if request.chunks is None else min(request.chunks * size.chunk, size.clip_frames)

    def told(step: ChunkStep) -> None:
        found.append(to_numpy(step.latent))
        progress(stage, len(found), 0)
        if not is_finite(step.latent):
            raise _NotFinite

    noise = given.inputs.get("noise")
    chunks = sample_stream(
        stream,
        frames=frames if noise is None else None,
        seed=request.seed,
        noise=noise,
        on_step=told,
    )
    try:
        for chunk in chunks:
            found.append(to_numpy(chunk.latent))
    except _NotFinite:
        pass
    return found


class _Forced:
    """The reference's stream, whose calls the others repeat: what a loop needs of a stream."""

    def __init__(self, exact: Stream, others: Mapping[str, Stream]) -> None:
        self.exact, self.others = exact, others
        self.rows: list[Row] = []
        self.seconds: list[float] = []
        self.reference_seconds: list[float] = []
        self._chunk = self._step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exact, name)

    def step(self, latent: Array, timestep: float) -> Array:
        """The reference's velocity; a row says how far the others' are from it."""
        expected = _timed(self.reference_seconds, lambda: self.exact.step(latent, timestep))
        found = {
            name: _timed(self.seconds if name == "engine" else [], _step(other, latent, timestep))
            for name, other in self.others.items()
        }
        self._add(str(self._step), [_compared(expected, found)])
        self._step += 1
        return expected

    def commit(self, latent: Array, timestep: float) -> None:
        """Keep a chunk everywhere; a row says how far the worst of what was kept is off."""
        for stream in chain([self.exact], self.others.values()):
            stream.commit(latent, timestep)
        compared = [
            _compared(expected, {n: other.kept(name) for n, other in self.others.items()})
            for name, expected in ((n, self.exact.kept(n)) for n in self.exact.kept_names)
        ]
        self._add("commit", compared)
        self._chunk, self._step = self._chunk + 1, 0

    def _add(self, what: str, compared: list[Compared]) -> None:
        self.rows.append({"step": f"{self._chunk}.{what}", **row_of(compared)})


def _step(stream: Stream, latent: Array, timestep: float) -> Callable[[], np.ndarray]:
    return lambda: to_numpy(stream.step(latent, timestep))  # which waits for the device


def _timed(seconds: list[float], work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - started)
    return result


def _compared(reference: Array, others: Mapping[str, Array]) -> Compared:
    """One array of the engine against the reference's."""
    expected = to_numpy(reference)
    floor = rounding = None
    if "floor" in others:
        floor = relative_l2(to_numpy(others["floor"]), expected)
    if "unrounded" in others:
        rounding = relative_l2(expected, to_numpy(others["unrounded"]))
    found = difference(to_numpy(others["engine"]), expected)
    parity = Parity(found.error, floor, () if rounding is None else (rounding,))
    return Compared(Call({}, expected), found, parity, None, None, rounding, None)
