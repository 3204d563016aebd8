"""Print what streaming blocks costs on one GPU, beside resident weights and diffusers' offloading.

    python -m tests.tables.offload FOLDER [--arms NAME ...] [--seconds 420]

FOLDER, best in memory as /dev/shm, keeps the bundles of random weights that it builds: 29 GB for
the 14B, 58 GB for the A14B, 3 GB for the 1.3B. Blocks are streamed from as much memory again. The
experts of the A14B are drawn from one seed, by their names. Every arm is a process of its own and
prints its row when it ends; arms that the time does not suffice for are named. `diffusers-*` are
diffusers' WanTransformer3DModel with random weights: its own group offloading with streams, and
what `enable_model_cpu_offload` does with the transformer, which is moved whole.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wanexport.runtime.gpu_fit import BUSES, streamed_seconds

GIB = 1 << 30


@dataclass(frozen=True)
class Arm:
    """One row: a model and size, how it is held, and GiB that the process may take."""

    name: str
    model: str
    frames: int
    how: str  # resident, blocks, model_offload or group_offload
    gib: float | None = None
    resident_blocks: int | None = None
    forwards: int = 5


ARMS = (
    Arm("14b", "t2v-14b", 81, "resident"),
    Arm("14b-12", "t2v-14b", 81, "blocks", 12),
    Arm("14b-8", "t2v-14b", 81, "blocks", 8),
    Arm("1.3b", "t2v-1.3b", 81, "resident"),
    Arm("1.3b-0", "t2v-1.3b", 81, "blocks", None, 0, 105),
    Arm("1.3b-short", "t2v-1.3b", 17, "resident"),
    Arm("1.3b-short-0", "t2v-1.3b", 17, "blocks", None, 0),
    Arm("diffusers-group", "t2v-14b", 81, "group_offload", None, None, 3),
    Arm("diffusers-model", "t2v-14b", 81, "model_offload", None, None, 3),
    Arm("14b-short", "t2v-14b", 17, "resident"),
    Arm("14b-short-8", "t2v-14b", 17, "blocks", 8),
    Arm("a14b-12", "t2v-a14b", 81, "blocks", 12, None, 2),
)
# Of resident weights, with which a row is compared.
BASE = {"14b-12": "14b", "14b-8": "14b", "1.3b-0": "1.3b", "1.3b-short-0": "1.3b-short"}
BASE |= {"14b-short-8": "14b-short"}


def bundle_of(folder: Path, arm: Arm) -> Path:
    """The bundle of an arm, built where it is not there."""
    bundle = folder / f"{arm.model}-bundle"
    done = folder / f"{arm.model}-{arm.frames}.built"
    if not done.exists():
        line = [sys.executable, "-m", "wanexport.exporter.cli.main", "build", "-m", arm.model]
        line += ["--random-weights", "0", "--resolution", "480x832", "--frames", str(arm.frames)]
        line += ["--backend", "aoti", "--dtype", "bf16", "--attention", "cudnn"]
        started = time.perf_counter()
        ended = subprocess.run([*line, "-o", str(bundle)], capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(ended.stderr.strip()[-300:])
        print(f"built {arm.model} at {arm.frames} frames: {time.perf_counter() - started:.0f} s")
        done.touch()
    return bundle


def measured(call: Callable[[], Any], forwards: int) -> dict[str, Any]:
    """Seconds of forwards, the md5 of the result, and memory; the first is not counted."""
    import torch

    first = call()
    torch.cuda.synchronize()
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
    options: dict[str, Any] = {"resolution": "480x832", "frames": arm.frames}
    if arm.how == "blocks":
        options |= {"offload": "blocks", "resident_blocks": arm.resident_blocks}
    denoiser = load(bundle, cuda_graph=False, **options)
    loaded = time.perf_counter() - started
    given = inputs_of({n: s.shape for n, s in denoiser.inputs.items() if n != "timestep"})
    row = measured(lambda: denoiser(timestep=950.0, **given), arm.forwards)
    row |= {"load": loaded, "resident": denoiser.resident_blocks}
    weights: Any = next(iter(denoiser.engines.values()))
    if arm.how == "blocks":
        parts = weights.weights.parts
        streamed = (len(parts.layers) - (denoiser.resident_blocks or 0)) * parts.layer_bytes
        row |= {"streamed": streamed, "rate": copy_rate(weights.weights)}
    if len(denoiser.engines) > 1:
        switching = []
        for timestep in (100.0, 950.0, 100.0):
            started = time.perf_counter()
            denoiser(timestep=timestep, **given)
            torch.cuda.synchronize()
            switching.append(time.perf_counter() - started)
        row["switching"] = switching
    return row


def copy_rate(weights: Any) -> float:
    """Bytes a second of a layer's copy to the GPU, with nothing beside it."""
    import torch

    source, size = weights._source, weights.parts.layers[0].size
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
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
    piece = torch.randn(1 << 20).mul_(0.02).bfloat16()
    for parameter in model.parameters():  # of a plausible size; to draw each takes minutes
        for part in parameter.data.view(-1).split(len(piece)):
            part.copy_(piece[: len(part)])
    if arm.how == "group_offload":
        model.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
            offload_type="block_level", num_blocks_per_group=1, use_stream=True,
        )  # fmt: skip
    loaded = time.perf_counter() - started
    given = inputs_of({"text": (1, 512, 4096), "latent": (1, 16, 1 + arm.frames // 4, 60, 104)})
    given = {name: value.bfloat16() for name, value in given.items()}
    time_step = torch.tensor([500], device="cuda")

    def forward() -> Any:
        # `enable_model_cpu_offload` moves the whole model at its first call, and away for the next.
        is_moved = arm.how == "model_offload"
        with torch.no_grad():
            run = model.to("cuda") if is_moved else model
            value = run(given["latent"], time_step, given["text"], return_dict=False)[0]
            if is_moved:
                model.to("cpu")
        return value

    return {**measured(forward, arm.forwards), "load": loaded}


def run(arm: Arm, folder: Path) -> dict[str, Any]:
    """The row of an arm, in this process."""
    import torch

    if arm.gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arm.gib * GIB / total)
    row = run_engine(arm, bundle_of(folder, arm)) if "offload" not in arm.how else None
    return {**asdict(arm), **(row or run_diffusers(arm)), "gpu": torch.cuda.get_device_name()}


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
    if "switching" in row:
        line += f"; forwards over the switch {', '.join(f'{s:.2f} s' for s in row['switching'])}"
    return line


def main() -> None:
    """Run the arms one after the other, each in a process, as long as there is time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--one", action="store_true", help="print the row of one arm as JSON")
    given = parser.parse_args()
    known = {arm.name: arm for arm in ARMS}
    if unknown := [name for name in given.arms if name not in known]:
        sys.exit(f"unknown arm {unknown[0]}: expected some of {', '.join(known)}")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.one:
        print(json.dumps(run(known[given.arms[0]], given.folder)))
        return
    ended, rows = time.monotonic() + given.seconds, dict[str, Any]()
    for name in given.arms:
        line = [sys.executable, "-m", "tests.tables.offload", str(given.folder), "--one"]
        left = ended - time.monotonic()
        try:
            if left < 10:
                raise TimeoutError
            child = subprocess.run(
                [*line, "--arms", name], capture_output=True, text=True, timeout=left,
                env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )  # fmt: skip
            for said in child.stderr.splitlines():
                if "WanExportWarning" in said:
                    print(f"  {name} said: {said.partition('Warning: ')[2]}", flush=True)
            *notes, last = child.stdout.strip().splitlines() or [""]
            if child.returncode:
                print(f"{name}: failed: {child.stderr.strip()[-400:]}", flush=True)
                continue
            rows[name] = json.loads(last)
            print(*notes, shown(rows[name], rows.get(BASE.get(name, ""))), sep="\n", flush=True)
        except (TimeoutError, subprocess.TimeoutExpired):
            print(f"{name}: no time left", flush=True)
    print(next((row["gpu"] for row in rows.values()), "no row"))


if __name__ == "__main__":
    main()
