"""Print what a chunk of a causal engine takes: against the cache, with a window, and on the host.

    python -m tests.tables.causal_speed FOLDER [PRESET]

One GPU. An engine of random weights is built in FOLDER unless one is there: Self-Forcing's 1.3B at
480x832 in chunks of 3 latent frames, with a cache of 21. A chunk is four steps and a commit. Times
are the GPU's, medians of 5 calls; the share is that of the rate of an 8192 x 8192 product in the
same run. Busy is the part of a chunk in which a kernel runs. A window is measured over 500 chunks
of one step and a commit each.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.causal_stream import Slots
from wanexport.exporter.build import build
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.trace.spans import busy_share
from wanexport.graphs.signature import product_flops
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

STEPS, ROUNDS, CHUNKS, WINDOW = 4, 5, 500, 9
KERNELS = 14  # are told by name
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize")


class Place(NamedTuple):
    """Where a chunk is: inputs on the GPU, and the number of keys as the host knows it."""

    inputs: dict[str, Tensor]
    keys: int | None


class Video(NamedTuple):
    """An engine with a video that it makes."""

    engine: AotiEngine
    config: WanConfig
    geometry: Geometry
    memory: Memory
    inputs: dict[str, Tensor]  # but for the place

    def call(self, place: Place, moment: str = "step") -> Tensor | None:
        """The velocity of the chunk that is there."""
        self.memory.attended = place.keys
        velocity: Tensor | None = self.engine(
            {**self.inputs, **place.inputs}, memory=self.memory, moment=moment
        )
        return velocity

    def chunk(self, place: Place, steps: int = STEPS) -> None:
        """All steps of a chunk and its commit."""
        for _ in range(steps):
            self.call(place)
        self.call(place, "commit")


def opened(folder: Path, preset: str) -> Video:
    """The engine of the folder's bundle, which is built first where there is none."""
    bundle = folder / f"{preset}-causal"
    if not (bundle / "manifest.json").exists():
        build(
            preset, random_weights=0, resolution="480x832", frames=81, chunk=3, cache=21,
            backends=["aoti"], device="cuda", dtype="bf16", output=bundle,
        )  # fmt: skip
    denoiser: Denoiser = load(bundle)
    engine, config = denoiser.engines[""], read_manifest(bundle).config
    assert isinstance(engine, AotiEngine)
    print(f"{denoiser.record.name}: attention {denoiser.record.details.attention}")
    print(f"  seconds of attention: {denoiser.record.build.get('attention_seconds')}")
    print(f"  proof: error {denoiser.record.proof['error']:.1e}, "
          f"floor {denoiser.record.proof['floor']:.1e}, "
          f"compiled in {denoiser.record.build['seconds']:.0f} s")  # fmt: skip
    given = forward_inputs(config, denoiser.geometry, 937.5, 0)
    inputs = {n: torch.from_numpy(given[n]).cuda() for n in ("latent", "timestep", "text")}
    return Video(engine, config, denoiser.geometry, engine.memory(), inputs)


def placed(slots: Slots, number: int) -> Place:
    """Where a chunk is, on the GPU, by a copy for which the host does not wait."""
    chunk = slots.geometry.chunk
    arrays = slots.place(number * chunk, chunk)
    rows = torch.zeros(len(arrays), 2 * chunk, dtype=torch.int64, pin_memory=True)
    for row, array in zip(rows, arrays.values()):
        row[: array.size] = torch.from_numpy(array)
    there = rows.cuda(non_blocking=True)
    inputs = {name: row[: array.size] for (name, array), row in zip(arrays.items(), there)}
    return Place(inputs, int(arrays["keys"][0]))


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The GPU's time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def product_rate() -> float:
    """FLOPs a second of the best of PyTorch's products."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds(lambda: a @ a)


def step_flops(video: Video, keys: int) -> float:
    """Of a step that attends to so many tokens."""
    geometry, config = video.geometry, video.config
    attention = 4 * geometry.num_tokens * (keys + config.text_len) * config.dim
    return product_flops(config, geometry) + config.num_layers * attention


def against_the_cache(video: Video, rate: float) -> Place:
    """Rows of every chunk of the clip; returns the place of the last."""
    print("frames of keys, step ms, commit ms, chunk ms, TFLOP of a chunk, share")
    geometry = video.geometry
    slots, place = Slots(geometry), Place({}, None)
    for number in range(geometry.clip_frames // geometry.chunk):
        place = placed(slots, number)
        keys = (number + 1) * geometry.num_tokens
        step = seconds(lambda: video.call(place))  # noqa: B023
        commit = seconds(lambda: video.call(place, "commit"))  # noqa: B023
        chunk = seconds(lambda: video.chunk(place))  # noqa: B023
        flops = (STEPS + 1) * step_flops(video, keys)
        share = flops / chunk / rate
        print(f"{(number + 1) * geometry.chunk:3} {1e3 * step:8.2f} {1e3 * commit:8.2f} "
              f"{1e3 * chunk:8.1f} {flops / 1e12:7.1f} {share:6.3f}")  # fmt: skip
    return place


def on_the_host(video: Video, place: Place) -> None:
    """How busy a chunk keeps the GPU, and where the host waits for it."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        video.chunk(place)
        torch.cuda.synchronize()
    events = profiler.events() or ()
    spans = [(e.time_range.start, e.time_range.end) for e in events if _is_kernel(e)]
    counts = {name: sum(e.name == name for e in events) for name in WAITS}
    print(f"GPU busy {busy_share(spans) or 0:.3f} of a chunk; calls that wait: {counts}, of which "
          f"one is this table's own")  # fmt: skip
    kernels = Counter[str]()
    for event in filter(_is_kernel, events):
        kernels[event.name] += event.time_range.elapsed_us()
    print("ms of a chunk's kernels:", "; ".join(
        f"{time / 1e3:.2f} {name[:60]}" for name, time in kernels.most_common(KERNELS)
    ))  # fmt: skip
    slots = Slots(video.geometry)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            video.chunk(placed(slots, number))
        print("waits of three chunks with their places: none")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _is_kernel(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not event.name.startswith("ProfilerStep")


def with_a_window(video: Video) -> None:
    """Chunks of one step and a commit, hundreds of them."""
    slots, marks = Slots(video.geometry, window=WINDOW, sink=1), []
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for number in range(CHUNKS + 1):
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        video.chunk(placed(slots, number), steps=1)
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    steady = times[WINDOW:]
    print(f"window of {WINDOW} with a sink of 1, {CHUNKS} chunks of a step and a commit: first 50 "
          f"{statistics.median(steady[:50]):.2f} ms, last 50 {statistics.median(steady[-50:]):.2f} "
          f"ms, least {min(steady):.2f}, most {max(steady):.2f}; memory grew by "
          f"{torch.cuda.memory_allocated() - before} bytes, peak "
          f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB")  # fmt: skip


def with_a_graph(video: Video, place: Place) -> None:
    """A step by a captured CUDA graph beside one that is launched, of one length and of any."""
    bound, given = video.engine.bound, {**video.inputs, **place.inputs}
    assert bound is not None
    for keys in (place.keys, None):
        launched = seconds(lambda: video.call(place._replace(keys=keys)))  # noqa: B023
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bound(given, video.memory)
        replayed = seconds(graph.replay)
        known = "known to the host" if keys else "on the device alone"
        print(f"a step with its keys {known}: launched {1e3 * launched:.2f} ms, by a CUDA graph "
              f"{1e3 * replayed:.2f} ms")  # fmt: skip


def cache_bytes(video: Video) -> int:
    """Of all that a session keeps."""
    return sum(tensor.nbytes for tensor in video.memory.state.values())


def main(folder: Path, preset: str) -> None:
    """Build where needed, and print all rows."""
    video = opened(folder, preset)
    rate = product_rate()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, product "
          f"{rate / 1e12:.0f} TF/s, cache {cache_bytes(video) / 1e9:.2f} GB")  # fmt: skip
    place = against_the_cache(video, rate)
    on_the_host(video, place)
    with_a_window(video)
    with_a_graph(video, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "self-forcing-1.3b")
