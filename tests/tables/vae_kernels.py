"""The kernels of `vae_speed`: convolutions alone, and the profile of a steady chunk."""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.tables.vae_arms import Arm, Video
from tests.tables.vae_bench import Bench
from wanexport.runtime.engines.convolution import convolution
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.vae_memory import decoding_flops, part_layers

SHOWN = 22  # kernels of a profile


def floor(bench: Bench, video: Video, chunk: int, rate: float) -> None:
    """Each convolution of decoding by itself, as the engine calls it, and their sum."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for kind, x, kernel in _convolutions(video.sizes(chunk), video.geometry, chunk):
        counts[kind, x, kernel] += 1
    total = flops = 0.0
    for (kind, x, kernel), count in counts.items():
        given = torch.randn(x, device=bench.device).bfloat16()
        weight = torch.randn(kernel, device=bench.device).bfloat16()
        padding = kernel[2] // 2

        def once(g: Tensor = given, w: Tensor = weight, p: int = padding) -> Tensor:
            return convolution(g, w, padding=p, tf32=False)

        seconds = bench.timed(once, rounds=3)
        frames = x[0] - kernel[1] + 1
        own = 2.0 * frames * x[1] * x[2] * kernel[0] * kernel[1] * kernel[2] ** 2 * x[3]
        total += count * seconds
        flops += count * own
        tried = _tried(bench, given, weight, padding) if bench.is_gpu else float("nan")
        bench.clock.say(
            f"  {kind:9} x {list(x)} kernel {list(kernel)} x{count}: {seconds * 1e3:.2f} ms, "
            f"{own / seconds / 1e12:.0f} TF/s; tried by cuDNN {tried * 1e3:.2f} ms"
        )
        del given, weight, once
    chunks = (video.geometry.latent[0] - 1) / chunk
    whole = decoding_flops(video.sizes(chunk), video.geometry)
    bench.clock.say(
        f"{video.name}: convolutions alone, k={chunk}: {total * chunks:.3f} s in "
        f"{chunks:.1f} chunks, {flops / total / 1e12:.0f} TF/s; all {whole / 1e12:.0f} TFLOP "
        f"at the product's rate: {whole / rate:.3f} s"
    )


def layouts(bench: Bench, video: Video) -> None:
    """The widest picture's convolution in fp32: channels last or first, TF32 or not."""
    place = part_layers(video.sizes(1), video.geometry, "decode", 1)[-1]
    width = place.layer.inner
    given = torch.randn(1, width, 6, place.height, place.width, device=bench.device)
    weight = torch.randn(width, width, 3, 3, 3, device=bench.device)
    flops = 2 * 27 * 4 * place.height * place.width * width**2
    if not bench.is_gpu:
        return
    for form in (torch.channels_last_3d, torch.contiguous_format):
        x, kernel = (t.contiguous(memory_format=form) for t in (given, weight))
        for tf32 in (False, True):
            seconds = bench.timed(
                partial(
                    torch.ops.aten.cudnn_convolution, x, kernel, [0, 1, 1], [1] * 3, [1] * 3,
                    1, False, True, tf32,
                )
            )  # fmt: skip
            bench.clock.say(
                f"  fp32 {width} channels, {form}, tf32 {tf32}: {seconds * 1e3:.2f} ms, "
                f"{flops / seconds / 1e12:.0f} TF/s"
            )


def _tried(bench: Bench, x: Tensor, weight: Tensor, padding: int) -> float:
    """The same with the fastest of cuDNN's kernels, and not the one that it holds to be."""
    ones, sides = [1, 1, 1], [0, padding, padding]
    given, kernel = x.permute(3, 0, 1, 2)[None], weight.permute(0, 4, 1, 2, 3)
    if weight.shape[1] == 1:
        given, kernel = x.permute(0, 3, 1, 2), weight[:, 0].permute(0, 3, 1, 2)
        ones, sides = [1, 1], [padding] * 2
    return bench.timed(
        lambda: torch.ops.aten.cudnn_convolution(
            given, kernel, sides, ones, ones, 1, True, False, False
        )
    )


def profile(bench: Bench, arm: Arm) -> None:
    """The kernels of a steady chunk by their time."""
    from torch.profiler import ProfilerActivity, profile

    bound, given = bench.open(arm), bench.clip(arm.video, arm.part)
    steps = bound.clip().feed(given.repeat(2, 1, 1, 1))
    for _ in range(2):
        next(steps)
    bench.wait()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.is_gpu
    began = time.perf_counter()
    with profile(activities=kinds) as found:
        next(steps)
        bench.wait()
    seconds = time.perf_counter() - began
    rows = [(e.key, e.self_device_time_total / 1e3, e.count) for e in found.key_averages()]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    total = sum(row[1] for row in rows)
    bench.clock.say(
        f"{arm.video.name}: a steady chunk of {arm.name}: {seconds * 1e3:.1f} ms of wall "
        f"clock under the profiler, {total:.1f} ms of kernels"
    )
    kinds_of = Counter[str]()
    for key, milliseconds, _ in rows:
        kinds_of[_kind(key)] += milliseconds
    for kind, milliseconds in kinds_of.most_common():
        bench.clock.say(f"  {kind}: {milliseconds:.1f} ms, {milliseconds / total:.0%}")
    for key, milliseconds, count in rows[:SHOWN]:
        bench.clock.say(f"  {milliseconds:8.2f} ms x{count:<3} {key[:130]}")


def _kind(kernel: str) -> str:
    name = kernel.lower()
    if "triton" in name:
        return "fused by Inductor"
    if any(word in name for word in ("nchw", "nhwc", "transform", "reorder", "copy", "memcpy")):
        if not any(word in name for word in ("fprop", "conv", "xmma", "implicit")):
            return "copies and layout"
    if any(word in name for word in ("fprop", "conv", "implicit", "cudnn")):
        return "convolutions"
    if any(word in name for word in ("gemm", "nvjet", "cublas", "cutlass")):
        return "products"
    return "other"


def _convolutions(
    sizes: VaeConfig, geometry: Geometry, chunk: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Kind, input and kernel of each convolution of a steady call that decodes."""
    for layer, frames, height, width in part_layers(sizes, geometry, "decode", chunk):
        inner, outer = layer.inner, layer.outer
        sides = (height, width)
        if layer.kind in ("conv", "head"):
            padded = -(-outer // 8) * 8
            yield layer.kind, (frames + 2, *sides, inner), (padded, 3, 3, 3, inner)
        elif layer.kind == "resnet":
            yield "resnet", (frames + 2, *sides, inner), (outer, 3, 3, 3, inner)
            yield "resnet", (frames + 2, *sides, outer), (outer, 3, 3, 3, outer)
        elif layer.kind == "up":
            if layer.temporal:
                yield "time", (frames + 2, *sides, inner), (2 * inner, 3, 1, 1, inner)
            grown = frames * (1 + layer.temporal)
            yield "up", (grown, 2 * height, 2 * width, inner), (outer, 1, 3, 3, inner)
