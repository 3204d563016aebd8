"""Print the table of TensorRT for RTX builds at full size; it needs no GPU, nor weights.

    python -m tests.tables.tensorrt [PRESET ...]

Each plan is built as `wanexport build` does, in a process of its own: seconds of the build and the
largest resident memory are that process's.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.tables.size import Size
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.tensorrt.backend import TensorRtBackend
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime.engines.tensorrt_library import import_tensorrt

FLAVOUR = "tensorrt-rtx"
TARGETS = ("sm86", "sm89", "sm120")
SIZES = [
    Size("t2v-1.3b", (480, 832), 81),
    Size("t2v-14b", (480, 832), 81),
    Size("i2v-14b", (480, 832), 81),
    Size("ti2v-5b", (704, 1280), 121),
]


def row(size: Size, arch: str, folder: Path) -> str:
    """Build one plan."""
    config, geometry = PRESETS[size.preset].config, size.geometry
    target = {"device": "cuda", "arch": arch, FLAVOUR: import_tensorrt(FLAVOUR).__version__}
    sampling = sampling_defaults(config, (), geometry)
    backend = TensorRtBackend(FLAVOUR)
    request = Request(config, geometry, sampling, FLAVOUR, "bf16", "cuda", target)
    own = folder / f"{size.folder}-{arch}"
    own.mkdir()
    compiled = backend.compile_engine(
        own, backend.resolve(request), {}, lambda stage, done, total: None
    )
    build = compiled.build
    return (
        f"| {size.preset} at {geometry.name} | {arch} | {build['layers']} | "
        f"{build['plan_seconds']:.1f} s | {build['plan_peak_rss_bytes'] / 2**20:.0f} MiB | "
        f"{compiled.files['denoiser'].stat().st_size / 1e6:.1f} MB | "
        f"{build['attention_layers']} of {build['attention_expected']} |"
    )


def rows(presets: list[str]) -> Iterator[str]:
    """One line a plan."""
    with TemporaryDirectory() as name:
        for size in SIZES:
            if not presets or size.preset in presets:
                for arch in TARGETS:
                    yield row(size, arch, Path(name))


def main(presets: list[str]) -> None:
    """Print the table in Markdown."""
    titles = "model and video | for | layers | build | peak memory | plan | native attention"
    print(f"| {titles} |\n{'|---' * 7}|", flush=True)
    for line in rows(presets):
        print(line, flush=True)
    print(f"\nTensorRT for RTX {import_tensorrt(FLAVOUR).__version__}, {os.cpu_count()} CPU cores")


if __name__ == "__main__":
    main(sys.argv[1:])
