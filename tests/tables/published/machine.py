"""The machine of a run, and how fast it multiplies and copies then.

python -m tests.tables.published.machine [--device cuda]
"""

import platform
from importlib.metadata import version

import torch

from tests.tables.published.clock import Times, in_turns, number
from tests.tables.published.section import Cells, Place, Section, main

PRODUCT = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}
COPY = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes


def processor(device: str) -> str:
    """The GPU's name, or what kind of CPU and how many threads PyTorch uses of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def product(device: str) -> Times:
    """A matrix product, fp32 on a CPU and bf16 on a GPU."""
    size, dtype = PRODUCT[device]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return in_turns({"product": lambda: a @ b}, device)["product"]


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    large = torch.ones(2, COPY[device], dtype=torch.uint8, device=device)
    times = in_turns({"copy": lambda: large[0].copy_(large[1])}, device)["copy"]
    return 2 * COPY[device] / times.median * 1e3


def measure(place: Place) -> Cells:
    """Facts of the machine, then the two rates."""
    size, dtype = PRODUCT[place.device]
    yield "processor", processor(place.device)
    yield "torch, Python", f"{torch.__version__}, {platform.python_version()}"
    yield "diffusers", version("diffusers")
    times = product(place.device)
    rates = [2 * size**3 / ms / 1e9 for ms in (times.median, max(times.values), min(times.values))]
    rate, least, most = (number(r) if r >= 1 else f"{r:.2g}" for r in rates)
    kind = f"{size} x {size}, {str(dtype).removeprefix('torch.')}"
    yield "matrix product, TFLOP/s", f"{rate} ({least} to {most}), {kind}"
    yield "copy, GB/s read and written", number(copy_rate(place.device) / 1e9)


ROWS = (
    "processor",
    "torch, Python",
    "diffusers",
    "matrix product, TFLOP/s",
    "copy, GB/s read and written",
)
SECTION = Section("machine", dict.fromkeys(ROWS, ""), measure)

if __name__ == "__main__":
    main(SECTION)
