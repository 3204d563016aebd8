"""The side of `bench` that runs in a process of its own: one arm, from nothing to timed forwards.

python -m wanexport.exporter.bench.process JOB.json        prints the figures as JSON
"""

import hashlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wanexport.exporter.bench.arms import MACHINE, Arm, Job
from wanexport.exporter.bench.opening import import_libraries, open_arm, read_inputs
from wanexport.exporter.child.child import main
from wanexport.runtime.arrays import to_numpy
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.machine.memory import peak_gpu_bytes, peak_rss

WARM_UP_SECONDS = 1.0  # of calls, until clocks and threads have settled
_PRODUCTS = {  # device -> m, k, n of the matrix products whose best rate is the peak
    "cuda": ((8192, 8192, 8192), (4096, 5120, 13824), (32768, 5120, 13824)),
    "cpu": ((2048, 2048, 2048),),
}
_PRODUCT_ROUNDS = 9


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job: measure the machine, or an arm."""
    stated = Job(**{**job, "arm": Arm(**job["arm"])})
    if stated.arm == MACHINE:
        return measure_machine(stated.device, stated.dtype)
    return measure_arm(stated)


def measure_arm(job: Job) -> dict[str, Any]:
    """Cold start, then timed forwards, then what is asked beside them; times in seconds.

    Raises WanExportError when the arm's engine cannot be opened.
    """
    laps = [job.spawned, time.time()]
    import_libraries(job)
    take_gpu(job.device)
    laps.append(time.time())
    before = _device_bytes() if job.on_gpu else 0
    forward = open_arm(job)
    laps.append(time.time())
    run = partial(forward, read_inputs(job))
    laps.append(time.time())
    wait = _wait_for(job.device)
    for _ in range(2):  # the calls of a guided step
        velocity = run()
        wait()
        laps.append(time.time())
    _warm_up(run, wait)
    result = {
        "seconds": time_calls(run, job.device, job.rounds),
        "cold_start": cold_start(laps),
        "peak_bytes": peak_bytes(job, before),
        "device_bytes": _device_bytes() if job.on_gpu else None,
    }
    if job.profile and job.on_gpu:
        result |= profile_step(run)
    array = to_numpy(velocity)
    save_arrays(Path(job.velocity), {"velocity": array})
    return result | {"md5": hashlib.md5(array.tobytes(), usedforsecurity=False).hexdigest()}


def peak_bytes(job: Job, before: int) -> int:
    """Memory that the arm took: of the GPU, where there is one, else all that the process has.

    before is what was in use of the GPU when the arm was opened: some libraries take memory that
    PyTorch knows nothing of, and keep what they have taken.
    """
    if not job.on_gpu:
        return peak_rss()
    backend = job.arm.backend
    if backend is not None and ENGINES[backend].own_memory:
        return _device_bytes() - before
    return peak_gpu_bytes()


def take_gpu(device: str) -> None:
    """Make a GPU that is named by its number the one that all calls are timed on."""
    if ":" in device:
        import torch

        torch.cuda.set_device(device)


def cold_start(laps: Sequence[float]) -> dict[str, float]:
    """Seconds of each phase, and from the process's start to the end of what is named last.

    laps are the times when the process was started and when each phase ended.
    """
    names = ("start", "import", "open", "inputs", "first_call", "second_call")
    phases = {name: end - begin for name, begin, end in zip(names, laps, laps[1:])}
    return {**phases, "first_forward": laps[-2] - laps[0], "first_step": laps[-1] - laps[0]}


def _wait_for(device: str) -> Callable[[], None]:
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def _warm_up(run: Callable[[], Any], wait: Callable[[], None]) -> None:
    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        run()
        wait()


def time_calls(run: Callable[[], Any], device: str, rounds: int) -> list[float]:
    """Seconds of each call, none of which begins before the one before it has ended."""
    if device == "cpu":
        return [_timed(run) for _ in range(rounds)]
    import torch

    seconds = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return seconds


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _device_bytes() -> int:
    """GPU memory in use by all that runs there: libraries' own buffers count, and the context."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def profile_step(run: Callable[[], Any]) -> dict[str, Any]:
    """Host waits in one forward, and the share of a guided step in which the GPU computes."""
    from wanexport.exporter.trace.capture import capture
    from wanexport.exporter.trace.chrome import events_of
    from wanexport.exporter.trace.spans import busy_share
    from wanexport.exporter.trace.steps import steps_of
    from wanexport.exporter.trace.waits import waits_of

    trace = capture(lambda: (run(), run()), 1, on_gpu=True, shapes=False)
    steps = steps_of(events_of(trace))
    return {
        "host_syncs": sum(wait.for_gpu for wait in waits_of(steps)) / 2,
        "gpu_busy": busy_share((event.start, event.end) for event in steps.device),
    }


def measure_machine(device: str, dtype: str) -> dict[str, Any]:
    """The best median rate of matrix products, in FLOP/s, and what was multiplied on what."""
    import torch

    take_gpu(device)
    rates = product_rates(device, dtype)
    _read_libraries(device)
    return {
        "peak": max(rates.values()),
        "products": rates,
        "product_dtype": str(product_kind(device, dtype)).removeprefix("torch."),
        "machine": machine_name(device),
        "torch": torch.__version__,
    }


def machine_name(device: str) -> str:
    """The GPU, or the processor and how many of its cores this process may use."""
    if device == "cpu":
        return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
    import torch

    name: str = torch.cuda.get_device_name(device)
    return name


def product_rates(device: str, dtype: str) -> dict[str, float]:
    """The median rate of each matrix product that the machine is measured with, in FLOP/s."""
    import torch

    rates, kind = {}, product_kind(device, dtype)
    for m, k, n in _PRODUCTS[device_kind(device)]:
        a, b = (torch.randn(rows, k, device=device).to(kind) for rows in (m, n))
        seconds = steady_seconds(partial(torch.nn.functional.linear, a, b), device)
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / seconds
    return rates


def product_kind(device: str, dtype: str) -> Any:
    """PyTorch's dtype of the products that a machine is measured with: on a CPU always fp32."""
    import torch

    from wanexport.graphs.weights import DTYPES

    return torch.float32 if device == "cpu" else DTYPES[dtype]


def steady_seconds(run: Callable[[], Any], device: str) -> float:
    """The median of a few calls, once clocks and threads have settled."""
    _warm_up(run, _wait_for(device))
    return statistics.median(time_calls(run, device, _PRODUCT_ROUNDS))


def _read_libraries(device: str) -> None:
    """Have the libraries in the page cache, lest the first arm to import one pay for the disk."""
    import torch

    if find_spec("diffusers"):
        from diffusers import WanTransformer3DModel  # noqa: F401
    for name, kind in ENGINES.items():
        if device_kind(device) in dict(kind.preferred):
            with suppress(WanExportError):  # its arm says what is missing
                kind.backend().import_library(name)
    if device != "cpu":  # cuDNN is opened by its first use
        video = torch.zeros(4, 4, 4, 4, 4, device=device, dtype=torch.bfloat16)
        torch.nn.functional.conv3d(video, video)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1], work)
