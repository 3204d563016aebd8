"""Decoding and encoding a video with VAE engines, and with diffusers' model, on one GPU.

    python -m tests.tables.vae_speed [--brief] [--tiny] [--seconds N]

Weights are random, of the published sizes. Prints as it goes: the rate of a matrix product; each
convolution alone, whose sum is the floor; engines of several chunks; the kernels of a steady chunk;
the errors of bf16 against fp32 without TF32, frame by frame, beside those of diffusers in bf16; and
diffusers as PyTorch runs it, in bf16, and compiled. An arm for which the time that is left does not
suffice is left out and said so. --brief has one engine, its errors, and diffusers' decoder beside
it. --tiny is a trial of the script on a CPU.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tests.tables.vae_arms import Arm, Clock, Video
from tests.tables.vae_bench import Bench
from tests.tables.vae_kernels import floor, layouts, profile


def compare(bench: Bench, video: Video, own: Mapping[str, Tensor]) -> None:
    """The errors of decoding against fp32 without TF32, beside those of diffusers in bf16."""
    clock = bench.clock
    reference = bench.diffusers(
        video, "decode", torch.float32, what="fp32 without TF32", tf32=False, rounds=0
    )
    rounded = bench.diffusers(video, "decode", torch.bfloat16, what="bf16", rounds=2)
    clock.say(f"{video.name}: errors against diffusers in fp32 without TF32")
    floor = bench.errors("diffusers bf16", rounded, reference)
    for name, pixels in own.items():
        off = bench.errors(name, pixels, reference)
        ratio = max(error / least for error, least in zip(off, floor))
        clock.say(f"  {name}: worst frame has {ratio:.3f} of diffusers' error in bf16")


def run(bench: Bench, tiny: bool) -> None:
    """All arms, what tells most first."""
    clock = bench.clock
    small = Video("Wan2.1", 64, 96, 13, tiny=True)
    main_video = small if tiny else Video("Wan2.1", 480, 832, 81)
    large = replace(small, frames=9) if tiny else Video("Wan2.1", 720, 1280, 81)
    other = Video("Wan2.2", 64, 96, 9, tiny=True) if tiny else Video("Wan2.2", 704, 1280, 121)
    chunks = (2,) if tiny else (4, 1, 2, 5)
    decode = [Arm(main_video, "decode", "bf16", k) for k in chunks]
    exact = Arm(main_video, "decode", "fp32", 2)
    encode = [Arm(main_video, "encode", "fp32", 2, tf32) for tf32 in (False, True)]
    largest = Arm(large, "decode", "bf16", 1 if tiny else 4)
    residual = Arm(other, "decode", "bf16", 1 if tiny else 3)
    bench.compile([*decode, largest, residual, exact, *encode][: 2 if tiny else None])
    rate = bench.product_rate()
    own: dict[str, Tensor] = {}
    for arm in decode:
        pixels = clock.arm(arm.name, 10, 60, partial(bench.engine, arm))
        own |= {} if pixels is None else {f"engine {arm.name}": pixels}
    clock.arm("profile", 10, 40, partial(profile, bench, decode[0]))
    clock.arm("convolutions", 20, 60, partial(floor, bench, main_video, chunks[0], rate))
    clock.arm("layouts", 20, 40, partial(layouts, bench, main_video))
    clock.arm(largest.name, 20, 60, partial(bench.engine, largest))
    clock.arm(residual.name, 30, 60, partial(bench.engine, residual, rounds=2))
    clock.arm("profile", 30, 40, partial(profile, bench, residual))
    pixels = clock.arm(exact.name, 40, 60, partial(bench.engine, exact, rounds=1))
    own |= {} if pixels is None else {f"engine {exact.name}": pixels}
    clock.arm("errors", 40, 90, partial(compare, bench, main_video, own))
    for arm in encode:
        clock.arm(arm.name, 25, 60, partial(bench.engine, arm, rounds=1))
    beside(bench, main_video)


def beside(bench: Bench, video: Video) -> None:
    """diffusers' arms."""
    half = torch.bfloat16
    for needs, part, dtype, what, how in (
        (75, "decode", half, "bf16 compiled", {"compiled": True}),
        (15, "decode", torch.float32, "fp32 as PyTorch runs it", {}),
        (15, "decode", half, "bf16, kernels channels-last", {"last": True}),
        (15, "encode", torch.float32, "fp32 as PyTorch runs it", {}),
    ):
        work = partial(bench.diffusers, video, part, dtype, what=what, **how)
        bench.clock.arm(f"diffusers {what}", needs, 2 * needs, work)


def brief(bench: Bench, tiny: bool) -> None:
    """One engine, its errors, and diffusers."""
    video = Video("Wan2.1", 64, 96, 13, tiny=True) if tiny else Video("Wan2.1", 480, 832, 81)
    arm = Arm(video, "decode", "bf16", 2 if tiny else 4)
    bench.compile([arm])
    bench.product_rate()
    pixels = bench.clock.arm(arm.name, 10, 60, partial(bench.engine, arm))
    own = {} if pixels is None else {f"engine {arm.name}": pixels}
    bench.clock.arm("errors", 40, 90, partial(compare, bench, video, own))
    beside(bench, video)


def main() -> None:
    """Print the tables, and write them as JSON where $OUT names a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=360)
    asked = parser.parse_args()
    device = "cpu" if asked.tiny else "cuda:0"
    clock = Clock(asked.seconds)
    name = "a CPU" if asked.tiny else torch.cuda.get_device_name()
    clock.say(f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    with TemporaryDirectory() as folder:
        bench = Bench(device, clock, Path(folder))
        (brief if asked.brief else run)(bench, asked.tiny)
    clock.say("done")
    print(json.dumps(bench.results))


if __name__ == "__main__":
    main()
