"""Print the table of large builds: bf16 ONNX with random weights at each main shape.

    python -m tests.tables.big_models FOLDER [MODEL ...]

FOLDER needs room for the largest bundle, 58 GB for two experts; each is deleted after its build.
Memory is what the build's processes hold together, sampled twenty times a second.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

MODELS = {  # preset -> resolution, frames
    "t2v-1.3b": ("480x832", 81),
    "ti2v-5b": ("704x1280", 121),
    "t2v-14b": ("480x832", 81),
    "i2v-14b": ("480x832", 81),
    "flf2v-14b": ("720x1280", 81),
    "t2v-a14b": ("720x1280", 81),
    "i2v-a14b": ("720x1280", 81),
}
GIB = 2**30


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants."""
    try:
        fields = (Path("/proc") / str(pid) / "status").read_text().splitlines()
        children = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS"))
    return own + sum(resident_bytes(int(child)) for child in children)


def build(preset: str, resolution: str, frames: int, folder: Path) -> str:
    """Build once and return a row of the table."""
    command = ["wanexport", "build", "-m", preset, "--random-weights", "0", "--dtype", "bf16"]
    command += ["--resolution", resolution, "--frames", str(frames), "-o", str(folder), "--json"]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            peak = max(peak, resident_bytes(child.pid))
            time.sleep(0.05)
        assert child.stdout is not None
        record = json.loads(child.stdout.read())
    seconds = time.monotonic() - started
    written = sum(file["size"] for file in record["weights"].values())
    (engine,) = record["engines"]
    size = engine["files"]["denoiser"]["size"]
    return (
        f"| {preset} at {resolution}x{frames} | {record['tokens']} | {written / 1e9:.2f} GB | "
        f"{size / 1e6:.2f} MB | {seconds:.0f} s | {peak / GIB:.2f} GiB | "
        f"{engine['proof']['error']:.1e} |"
    )


def main(folder: Path, models: list[str]) -> None:
    """Print the table in Markdown."""
    print("| model | tokens | weights | engine | time | peak memory | proof |\n" + "|---" * 7 + "|")
    for preset in models or MODELS:
        print(build(preset, *MODELS[preset], folder / preset), flush=True)
        shutil.rmtree(folder / preset)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
