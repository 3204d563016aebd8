"""Print how long a 14B expert takes to reach a GPU, and to take the other's place (`--offload`).

    python -m tests.tables.switch FOLDER

FOLDER gets two bf16 weights files of 29 GB, deleted at the end; in a folder in memory, such as
/dev/shm, experts are switched fastest. Each file holds one random piece over and over, and a switch
is checked by the first and the last bytes on the GPU.
"""

import os
import statistics
import sys
from pathlib import Path

import torch

from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines.device_weights import DeviceWeights

SWITCHES = 6


def write(path: Path, header: bytes, size: int) -> None:
    """A weights file of random bytes."""
    piece = os.urandom(64 << 20)
    with path.open("wb", buffering=0) as file:
        file.write(header)
        for start in range(0, size, len(piece)):
            file.write(memoryview(piece)[: size - start])


def check(weights: DeviceWeights, path: Path) -> None:
    """Raise AssertionError unless the GPU holds the file's first and last bytes."""
    with path.open("rb") as file:
        for name in (min(weights.tensors), max(weights.tensors)):
            entry = weights._entries[name]
            file.seek(entry.offset)
            expected = torch.frombuffer(bytearray(file.read(entry.size)), dtype=torch.uint8)
            held = weights.tensors[name].reshape(-1).view(torch.uint8).cpu()
            assert torch.equal(held, expected), name


def main(folder: Path) -> None:
    """Print what was measured, in two lines."""
    header, entries = weights_layout(PRESETS["t2v-a14b"].config, "bf16")
    size = sum(entry.size for entry in entries.values())
    files = [folder / f"{expert}.safetensors" for expert in ("high_noise", "low_noise")]
    try:
        for file in files:
            write(file, header, size)
        weights = DeviceWeights(files[0], torch.device("cuda", 0))
        for number in range(1, SWITCHES + 1):
            with weights.held(pin(files[number % 2])):
                check(weights, files[number % 2])
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    times = weights.switches
    middle = statistics.median(times)
    print(f"switch of {size / 1e9:.1f} GB: {middle:.2f} s ({min(times):.2f} to {max(times):.2f})")
    print(f"{size / middle / 1e9:.1f} GB/s; {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
