"""Print the table of a forward's time over models and video sizes, on a GPU.

    python -m tests.tables.size FOLDER

The regions are compiled for all sizes at once, in FOLDER, and run with random bf16 weights on the
GPU, one size after the other: medians of 5 forwards with minimum and maximum, beside an 8192 x 8192
matrix product timed right after them. On a Hopper GPU with flash-attn-4 installed, attention may
run on FlashAttention-4; it is chosen as a build does.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanexport.exporter.backends.aoti.attention import choose_kernels
from wanexport.exporter.backends.aoti.compile import compile_regions
from wanexport.exporter.backends.aoti.flash_attention import compile_flash_attention
from wanexport.exporter.bench.process import time_calls
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.config import PRESETS
from wanexport.graphs.graph import parameter_dtype
from wanexport.graphs.signature import forward_flops
from wanexport.runtime import Geometry, WanExportError
from wanexport.runtime.bundle.signature import parameter_shapes, program_of
from wanexport.runtime.engines.aoti_regions import Regions
from wanexport.runtime.engines.device import to_device
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.engines.operators import open_kernel
from wanexport.runtime.family import family_of
from wanexport.runtime.wan_config import WanConfig

ROUNDS, WARM_UPS = 5, 1


class Size(NamedTuple):
    """A model and a video."""

    preset: str
    resolution: tuple[int, int]
    frames: int

    @property
    def geometry(self) -> Geometry:
        """With the stride of the model's own VAE."""
        stride = family_of(PRESETS[self.preset].config).vae.spatial_stride
        return Geometry(*self.resolution, self.frames, stride)

    @property
    def folder(self) -> str:
        """Where its packages go."""
        return f"{self.preset}-{self.geometry.name}"


SIZES = [
    *(Size("t2v-1.3b", (480, 832), frames) for frames in (17, 33, 49, 81, 121)),
    Size("t2v-1.3b", (720, 1280), 81),
    Size("ti2v-5b", (704, 1280), 121),
    Size("t2v-14b", (480, 832), 81),
    Size("t2v-14b", (720, 1280), 81),
]


def compile_all(folder: Path) -> Path | None:
    """Compile every size's regions, and the attention kernel where that can be."""

    def compile_size(size: Size) -> None:
        own = folder / size.folder
        own.mkdir(parents=True)
        config = PRESETS[size.preset].config
        graph = family_of(config).graph
        compile_regions(graph, config, size.geometry, "bf16", "cuda", own)

    def compile_flash() -> Path | None:
        try:
            return compile_flash_attention(folder, dtype="bf16", head_dim=128)
        except WanExportError as error:
            print(error, file=sys.stderr)
            return None

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(SIZES) + 1) as pool:
        flash = pool.submit(compile_flash)
        list(pool.map(compile_size, SIZES))
        return flash.result()


def random_weights(config: WanConfig) -> dict[str, Tensor]:
    """Parameters of variance 1 / fan_in on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        scale = max(1, torch.Size(shape[1:]).numel()) ** -0.5
        dtype = parameter_dtype(name, torch.bfloat16)
        tensor = torch.empty(shape, dtype=dtype, device="cuda")
        tensors[name] = tensor.normal_(0, scale, generator=generator)
    return tensors


def rows(folder: Path, flash: Path | None) -> Iterator[str]:
    """One line a size."""
    for preset, sizes in groupby(SIZES, key=lambda size: size.preset):
        config = PRESETS[preset].config
        weights = random_weights(config)
        for size in sizes:
            yield row(size, config, weights, folder / size.folder, flash)
        del weights
        torch.cuda.empty_cache()


def row(
    size: Size, config: WanConfig, weights: dict[str, Tensor], folder: Path, flash: Path | None
) -> str:
    """Measure one size."""
    device, geometry = torch.device("cuda", 0), size.geometry
    chosen, _ = choose_kernels(config, geometry, "bf16", "cuda", flash)
    kernels = {kind: open_kernel(name, flash) for kind, name in chosen.items()}
    program = program_of(config, geometry)
    files = {call.name: folder / f"{call.name}.pt2" for call in program.calls}
    bound = Regions(files, program, kernels, device).bind(weights)
    arrays = forward_inputs(config, geometry, 812.0, 0)
    inputs = {name: to_device(array, device) for name, array in arrays.items()}
    assert bound(inputs, Memory()).isfinite().all()
    times = time_calls(lambda: bound(inputs, Memory()), "cuda", ROUNDS + WARM_UPS)[WARM_UPS:]
    a, b = torch.randn(2, 8192, 8192, device=device).to(torch.bfloat16)
    product = sorted(time_calls(lambda: a @ b, "cuda", ROUNDS + WARM_UPS)[WARM_UPS:])[ROUNDS // 2]
    median, peak = sorted(times)[ROUNDS // 2], 2 * 8192**3 / product
    flops, memory = forward_flops(config, geometry), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return (
        f"| {size.preset} at {geometry.name} | {geometry.num_tokens} | {flops / 1e12:.0f} | "
        f"{median * 1e3:.1f} ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}) | "
        f"{flops / median / 1e12:.0f} | {peak / 1e12:.0f} | {flops / median / peak:.0%} | "
        f"{chosen['self']} | {memory / 1e9:.1f} GB |"
    )


def main(folder: Path) -> None:
    """Print the table in Markdown."""
    flash = compile_all(folder)
    titles = "model and size | tokens | TFLOPs | forward, ms | TFLOP/s | product, TFLOP/s | of it"
    print(f"| {titles} | attention | GPU memory |\n{'|---' * 9}|", flush=True)
    for line in rows(folder, flash):
        print(line, flush=True)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
