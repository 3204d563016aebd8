"""Print what streaming blocks costs on one GPU, beside resident weights and diffusers' offloading.

    python -m tests.tables.offload FOLDER [--arms NAME ...] [--seconds 540]

FOLDER, best in memory as /dev/shm, keeps the bundles of random weights that it builds: 29 GB for
the 14B, 29 GB more for the A14B, 3 GB for the 1.3B. Blocks are streamed from as much memory again:
what the host lacks memory for is left out, and said. Builds and arms are processes of their own,
each with a limit of time; an arm prints its row when it ends, or why it failed, and the next one
begins. FOLDER keeps the rows, so that a later call compares with them. `diffusers-*` are
diffusers' WanTransformer3DModel with random weights: its own group offloading with streams, and
what `enable_model_cpu_offload` does with the transformer, which is moved whole, once a video.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.tables.offload_models import RESOLUTION, SINGLE, bundle_of, mark_of
from wanexport.runtime.gpu_fit import BUSES, streamed_seconds
from wanexport.runtime.machine.memory import available_bytes

GIB = 1 << 30
BUILD_LIMIT = 200.0  # seconds
STARTED = time.perf_counter()


@dataclass(frozen=True)
class Arm:
    """One row: a model and size, how it is held, and GiB that the process may take.

    `host_gb` is what it takes of the host's memory at the most, and `limit` its seconds.
    """

    name: str
    model: str
    frames: int
    how: str  # resident, blocks, model_offload or group_offload
    gib: float | None = None
    resident_blocks: int | None = None
    forwards: int = 5
    host_gb: float = 6
    limit: float = 60


ARMS = (
    Arm("1.3b", "t2v-1.3b", 81, "resident"),
    Arm("1.3b-0", "t2v-1.3b", 81, "blocks", None, 0, 105, 10, 120),
    Arm("1.3b-short", "t2v-1.3b", 17, "resident"),
    Arm("1.3b-short-0", "t2v-1.3b", 17, "blocks", None, 0, host_gb=10),
    Arm("14b", "t2v-14b", 81, "resident"),
    Arm("14b-12", "t2v-14b", 81, "blocks", 12, host_gb=36, limit=90),
    Arm("14b-8", "t2v-14b", 81, "blocks", 8, host_gb=36, limit=90),
    Arm("14b-short", "t2v-14b", 17, "resident"),
    Arm("14b-short-8", "t2v-14b", 17, "blocks", 8, host_gb=36, limit=90),
    Arm("diffusers-group", "t2v-14b", 81, "group_offload", None, None, 2, 80, 150),
    Arm("diffusers-model", "t2v-14b", 81, "model_offload", None, None, 2, 36, 120),
    Arm("a14b", "t2v-a14b", 81, "resident", None, None, 2, limit=90),
    Arm("a14b-12", "t2v-a14b", 81, "blocks", 12, None, 2, 36, 150),
)
# Of resident weights, with which a row is compared.
BASE = {"14b-12": "14b", "14b-8": "14b", "1.3b-0": "1.3b", "1.3b-short-0": "1.3b-short"}
BASE |= {"14b-short-8": "14b-short", "a14b-12": "a14b"}


def say(text: str) -> None:
    """A line of how far an arm has come, shown where it fails."""
    print(f"at {time.perf_counter() - STARTED:.0f} s: {text}", file=sys.stderr, flush=True)


def measured(call: Callable[[], Any], forwards: int) -> dict[str, Any]:
    """Seconds of forwards, the md5 of the result, and memory; the first is not counted."""
    import torch

    first = call()
    torch.cuda.synchronize()
    say("one forward ended")
    torch.cuda.reset_peak_memory_stats()
    seconds, host, device = [], host_bytes(), torch.cuda.memory_allocated()
    for _ in range(forwards):
        started = time.perf_counter()
        last = call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    digests = {digest(value) for value in (first, last)}
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "forwards": forwards,
        "md5": " or ".join(sorted(digests)),  # one, where a call repeats
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "host": host_bytes(),
        "host_growth": host_bytes() - host,
        "device_growth": torch.cuda.memory_allocated() - device - last.nbytes,
    }


def digest(value: Any) -> str:
    """The start of the md5 of a result, NaN or not."""
    return hashlib.md5(value.float().cpu().numpy().tobytes()).hexdigest()[:12]


def host_bytes() -> int:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def inputs_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator).cuda() for n, shape in shapes.items()}


def run_engine(arm: Arm, bundle: Path) -> dict[str, Any]:
    """An engine of ours, with the copy rate of what it streams."""
    import torch

    from wanexport.runtime import load

    started = time.perf_counter()
    options: dict[str, Any] = {"resolution": RESOLUTION, "frames": arm.frames}
    if arm.how == "blocks":
        options |= {"offload": "blocks", "resident_blocks": arm.resident_blocks}
    denoiser = load(bundle, cuda_graph=False, **options)
    loaded = time.perf_counter() - started
    say(f"loaded in {loaded:.1f} s")
    given = inputs_of({n: s.shape for n, s in denoiser.inputs.items() if n != "timestep"})
    row = measured(lambda: denoiser(timestep=950.0, **given), arm.forwards)
    row |= {"load": loaded, "resident": denoiser.resident_blocks}
    if len(denoiser.engines) > 1:
        switching = []
        for timestep in (100.0, 950.0, 100.0):
            started = time.perf_counter()
            velocity = denoiser(timestep=timestep, **given)
            torch.cuda.synchronize()
            switching.append(time.perf_counter() - started)
        row |= {"switching": switching, "md5": f"{row['md5']} and {digest(velocity)}"}
    if arm.how == "blocks":  # last: what it copies overwrites a buffer
        weights: Any = next(iter(denoiser.engines.values()))
        parts = weights.weights.parts
        streamed = (len(parts.layers) - (denoiser.resident_blocks or 0)) * parts.layer_bytes
        row |= {"streamed": streamed, "rate": copy_rate(weights.weights)}
    return row


def copy_rate(weights: Any) -> float:
    """Bytes a second of a layer's copy to the GPU, with nothing beside it."""
    import torch

    source, size = weights._source, weights.parts.layers[0].size
    target = source.buffers[0]  # for another one the limit may leave no room
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        source.host.copy(0, target)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(size / statistics.median(seconds[1:]))


def run_diffusers(arm: Arm) -> dict[str, Any]:
    """diffusers' model on one forward, with its own offloading."""
    import torch
    from diffusers import WanTransformer3DModel

    started = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40
        )
    torch.set_default_dtype(torch.float32)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    config = model.config  # tables are no parameters, and are empty by now
    model.rope = type(model.rope)(
        config.attention_head_dim, config.patch_size, config.rope_max_seq_len
    )
    piece = torch.randn(1 << 20).mul_(0.02).bfloat16()
    for parameter in model.parameters():  # of a plausible size; to draw each takes minutes
        for part in parameter.data.view(-1).split(len(piece)):
            part.copy_(piece[: len(part)])
    say("the model has its values")
    if arm.how == "group_offload":
        model.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
            offload_type="block_level", num_blocks_per_group=1, use_stream=True,
        )  # fmt: skip
    loaded = time.perf_counter() - started
    given = inputs_of({"text": (1, 512, 4096), "latent": (1, 16, 1 + arm.frames // 4, 60, 104)})
    given = {name: value.bfloat16() for name, value in given.items()}
    time_step, moving = torch.tensor([500], device="cuda"), list[float]()

    def forward() -> Any:
        with torch.no_grad():
            return model(given["latent"], time_step, given["text"], return_dict=False)[0]

    def move(place: str) -> None:
        started = time.perf_counter()
        model.to(place)
        torch.cuda.synchronize()
        moving.append(time.perf_counter() - started)
        say(f"moved to {place} in {moving[-1]:.1f} s")

    if arm.how == "model_offload":  # to the GPU at a video's first step, and back after its last
        move("cuda")
    row = measured(forward, arm.forwards)
    if arm.how == "model_offload":
        move("cpu")
    return {**row, "load": loaded, "moving": moving}


def run(arm: Arm, folder: Path) -> dict[str, Any]:
    """The row of an arm, in this process."""
    import torch

    if arm.gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arm.gib * GIB / total)
    is_ours = "offload" not in arm.how
    row = run_engine(arm, bundle_of(folder, arm.model)) if is_ours else run_diffusers(arm)
    return {**asdict(arm), **row, "gpu": torch.cuda.get_device_name()}


def shown(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """A row as a line."""
    held = row["how"] if row.get("resident") is None else f"blocks, {row['resident']} stay"
    line = (
        f"{row['name']}: {row['model']} 480x832x{row['frames']}, {held}, limit {row['gib']} GiB: "
        f"forward {row['seconds']:.3f} s ({row['least']:.3f} to {row['most']:.3f}), "
        f"peak {row['peak'] / GIB:.2f} GiB (reserved {row['reserved'] / GIB:.2f}), "
        f"host {row['host'] / 1e9:.1f} GB, load {row['load']:.1f} s, md5 {row['md5']}; "
        f"{row['forwards']} forwards grew host {row['host_growth'] / 1e6:.1f} MB, "
        f"GPU {row['device_growth'] / 1e6:.1f} MB"
    )
    if "rate" in row:
        line += f"; streams {row['streamed'] / 1e9:.2f} GB, copies at {row['rate'] / 1e9:.1f} GB/s"
    if base is not None:
        predicted = {
            name: streamed_seconds(base["seconds"], row["streamed"], rate) / base["seconds"]
            for name, rate in {"here": row["rate"], **BUSES}.items()
        }
        told = ", ".join(f"{name} {factor:.2f}" for name, factor in predicted.items())
        equal = "equal" if row["md5"] == base["md5"] else "DIFFERENT"
        line += (
            f"; {row['seconds'] / base['seconds']:.3f} x resident, predicted {told}; md5 {equal}"
        )
    if row.get("moving"):
        line += (
            f"; moved to the GPU and back in {' and '.join(f'{s:.2f} s' for s in row['moving'])}"
        )
    if "switching" in row:
        line += f"; forwards over the switch {', '.join(f'{s:.2f} s' for s in row['switching'])}"
    return line


class Failed(Exception):
    """Why an arm, or a build, gave nothing."""


def child(module: str, *arguments: str, seconds: float) -> tuple[str, str]:
    """What a module prints to both outputs; after so many seconds it is ended, with its children.

    Raises Failed, with the last that it said.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    )  # fmt: skip
    try:
        said, errors = process.communicate(timeout=seconds)
        reason = f"ended with {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, errors = process.communicate()
        reason = f"took longer than {seconds:.0f} s"
    if reason:
        raise Failed(f"{reason}: {' | '.join(errors.strip().splitlines()[-6:])[-600:]}")
    return said, errors


def build_missing(folder: Path, model: str, frames: int, left: Callable[[], float]) -> None:
    """Build what an arm opens, where it is not there. Raises Failed."""
    if mark_of(folder, model, frames).exists():
        return
    if single := SINGLE.get(model):
        build_missing(folder, single, frames, left)
    started = time.monotonic()
    arguments = (str(folder), model, str(frames))
    child("tests.tables.offload_models", *arguments, seconds=min(BUILD_LIMIT, left()))
    seconds = time.monotonic() - started
    print(f"built {model} at {frames} frames in {seconds:.0f} s", flush=True)


def row_of(arm: Arm, folder: Path, left: Callable[[], float]) -> dict[str, Any]:
    """The row of an arm, by a process of its own. Raises Failed."""
    if left() < 15:
        raise Failed("no time left")
    if "offload" not in arm.how:
        build_missing(folder, arm.model, arm.frames, left)
    free = available_bytes() / 1e9
    if free < arm.host_gb:
        raise Failed(f"takes {arm.host_gb:.0f} GB of the host's memory, {free:.0f} are free")
    arguments = (str(folder), "--one", "--arms", arm.name)
    said, errors = child("tests.tables.offload", *arguments, seconds=min(arm.limit, left()))
    for line in errors.splitlines():
        if "WanExportWarning" in line:
            print(f"  {arm.name} said: {line.partition('Warning: ')[2]}", flush=True)
    row: dict[str, Any] = json.loads(
        next(line for line in reversed(said.splitlines()) if line[:1] == "{")
    )
    return row


def main() -> None:
    """Run the arms one after the other, each in a process, as long as there is time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--one", action="store_true", help="print the row of one arm as JSON")
    given = parser.parse_args()
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in given.arms if name not in known]:
        sys.exit(f"unknown arm {unknown[0]}: expected some of {', '.join(known)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.one:
        print(json.dumps(run(known[given.arms[0]], given.folder)))
        return
    ends = time.monotonic() + given.seconds
    kept = given.folder / "rows.json"
    rows = json.loads(kept.read_text()) if kept.exists() else dict[str, Any]()
    for name in given.arms:
        started = time.monotonic()
        try:
            rows[name] = row_of(known[name], given.folder, lambda: ends - time.monotonic())
            print(shown(rows[name], rows.get(BASE.get(name, ""))), flush=True)
            kept.write_text(json.dumps(rows))
        except Exception as error:  # of whatever kind: the other arms go on
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
        seconds, free = time.monotonic() - started, available_bytes() / 1e9
        print(f"  {name} took {seconds:.0f} s in all; the host has {free:.0f} GB free", flush=True)
    print(next((row["gpu"] for row in rows.values()), "no row"))


if __name__ == "__main__":
    main()
