"""Decoding and encoding a video with VAE engines, and with diffusers' model, on one GPU.

    python -m tests.tables.vae_speed [--tiny] [--seconds N]

Weights are random, of the published sizes. Prints as it goes: the rate of a matrix product; each
convolution alone, whose sum is the floor; engines of several chunks; the kernels of a steady chunk;
the errors of bf16 against fp32 without TF32, frame by frame, beside those of diffusers in bf16; and
diffusers as PyTorch runs it, in bf16, and compiled. An arm for which the time that is left does not
suffice is left out and said so. --tiny is a trial of the script on a CPU.
"""

import argparse
import gc
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tests.oracles.official_vae import GOLDEN
from wanexport.exporter.backends.aoti.compile import RegionJob
from wanexport.exporter.child.child import run_process
from wanexport.exporter.child.process import Lifeline
from wanexport.runtime.engines.convolution import convolution
from wanexport.runtime.engines.operators import open_kernel
from wanexport.runtime.engines.vae_regions import BoundVae, VaeRegions
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.parts.vae_keys import config_of
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.vae_memory import decoding_flops, part_layers, steady_flops
from wanexport.runtime.wan_vae import GRAPH, computes_fp32, parameter_shapes

ROUNDS = 3
PRODUCT = 8192  # rows and columns of the product that tells the GPU's rate
SHOWN = 22  # kernels of a profile


@dataclass(frozen=True)
class Video:
    """A VAE and a size of video."""

    version: str  # Wan2.1 or Wan2.2
    height: int
    width: int
    frames: int
    tiny: bool = False

    @cached_property
    def diffusers_config(self) -> dict[str, Any]:
        """Arguments of AutoencoderKLWan."""
        shapes = json.loads(GOLDEN.read_text())[self.version]["tiny" if self.tiny else "full"]
        return config_of({name: tuple(shape) for name, shape in shapes.items()}, GOLDEN)

    def sizes(self, decode: int = 1, encode: int = 1, tf32: bool = False) -> VaeConfig:
        """The VAE's sizes, in chunks."""
        own = self.diffusers_config
        return VaeConfig(
            own["z_dim"], own["base_dim"], own["decoder_base_dim"], own["is_residual"],
            decode, encode, tf32,
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        """The geometry."""
        return Geometry(self.height, self.width, self.frames, self.sizes().spatial_stride)

    @property
    def name(self) -> str:
        """How the tables call it."""
        return f"{self.version} {self.geometry.name}"


@dataclass(frozen=True)
class Arm:
    """An engine of one part to measure."""

    video: Video
    part: str
    dtype: str
    chunk: int
    tf32: bool = False

    @property
    def sizes(self) -> VaeConfig:
        """The VAE's sizes, in this arm's chunks."""
        return self.video.sizes(self.chunk, self.chunk, self.tf32)

    @property
    def name(self) -> str:
        """How the tables call it."""
        return f"{self.part} {self.dtype}{' tf32' * self.tf32} k={self.chunk}"

    @property
    def jobs(self) -> dict[str, tuple[Any, ...]]:
        """What is to be compiled for each call; a first frame's call is of no chunk."""
        own = (self.video, self.dtype, self.tf32)
        return {
            f"{self.part}_first": (*own, f"{self.part}_first", 1),
            f"{self.part}_next": (*own, f"{self.part}_next", self.chunk),
        }


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        """Print a line with the time since the beginning."""
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)

    def arm(self, name: str, needs: float, at_most: float, work: Callable[[], Any]) -> Any:
        """What work gives, if there are the seconds that it needs; what it raises is said."""
        if self.left < needs:
            self.say(f"{name}: left out, {self.left:.0f} s are left")
            return None
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(max(1, round(min(self.left, at_most))))
        try:
            return work()
        except Exception as error:  # the other arms are still worth their time
            self.say(f"{name}: {type(error).__name__}: {str(error)[:400]}")
            return None
        finally:
            signal.alarm(0)
            _free()


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("it took too long")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Bench:
    """All arms on a device."""

    def __init__(self, device: str, clock: Clock, folder: Path) -> None:
        self.device, self.clock, self.folder = torch.device(device), clock, folder
        self.results: list[dict[str, Any]] = []
        self.packages: dict[tuple[Any, ...], Path] = {}
        self.weights: dict[str, dict[str, Tensor]] = {}

    @property
    def is_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any], rounds: int = ROUNDS, warm: int = 1) -> float:
        """The least seconds of a call, after some to warm up."""
        for _ in range(warm):
            work()
        best = float("inf")
        for _ in range(rounds):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            best = min(best, time.perf_counter() - began)
        return best

    def compile(self, arms: list[Arm]) -> None:
        """Compile every call of the arms once, at the same time."""
        wanted = {job: arm for arm in arms for job in arm.jobs.values()}
        with ThreadPoolExecutor(len(wanted)) as pool, Lifeline() as line:
            futures = {}
            for number, (job, arm) in enumerate(wanted.items()):
                path = self.folder / f"{number}.pt2"
                self.packages[job] = path
                region = RegionJob(
                    job[3], GRAPH, asdict(arm.sizes), asdict(arm.video.geometry), arm.dtype,
                    str(self.device), str(path),
                )  # fmt: skip
                futures[job] = pool.submit(
                    run_process, "backends.aoti.compile", region, self.folder, lifeline=line
                )
            for job, future in futures.items():
                try:
                    seconds = future.result()["seconds"]
                    self.clock.say(f"compiled {job[0].name} {job[1]} {job[3]} {job[4]}: {seconds}")
                except Exception as error:
                    del self.packages[job]
                    self.clock.say(f"{job[3]} of {job[0].name}: {str(error)[:600]}")

    def tensors(self, video: Video) -> dict[str, Tensor]:
        """Random parameters under diffusers' names and shapes, fp32, on the device."""
        if video.version not in self.weights:
            from diffusers import AutoencoderKLWan

            with torch.device("meta"):
                shapes = AutoencoderKLWan(**video.diffusers_config).state_dict()
            generator = torch.Generator(self.device).manual_seed(0)
            self.weights = {video.version: {}}
            for name, meta in shapes.items():
                own = torch.randn(meta.shape, generator=generator, device=self.device)
                if name.endswith("gamma"):
                    own = 1 + 0.1 * own
                elif meta.ndim == 1:
                    own *= 0.05
                else:
                    own *= meta[0].numel() ** -0.5
                self.weights[video.version][name] = own
        return self.weights[video.version]

    def stored(self, arm: Arm) -> dict[str, Tensor]:
        """The same as an engine's weights file has them."""
        own = self.tensors(arm.video)
        config = arm.video.diffusers_config
        found = {
            "latents_mean": torch.tensor(config["latents_mean"], device=self.device),
            "latents_scale": 1 / torch.tensor(config["latents_std"], device=self.device),
        }
        half = {"fp32": torch.float32, "bf16": torch.bfloat16}[arm.dtype]
        for name, shape in parameter_shapes(arm.sizes).items():
            if name in found:
                continue
            tensor = own[name]
            if tensor.ndim > 2 and len(shape) > 1:
                tensor = tensor.movedim(1, -1)
            dtype = torch.float32 if computes_fp32(name) else half
            found[name] = tensor.reshape(shape).to(dtype).contiguous()
        return found

    def clip(self, video: Video, part: str) -> Tensor:
        """What is decoded or encoded, [frames, height, width, channels]."""
        generator = torch.Generator(self.device).manual_seed(1)
        count, height, width = video.geometry.latent
        shape = (count, height, width, video.sizes().channels)
        if part == "encode":
            shape = (video.frames, video.height, video.width, 3)
        return torch.randn(shape, generator=generator, device=self.device).clamp(-3, 3)

    def open(self, arm: Arm) -> BoundVae:
        """The arm's engine."""
        if any(job not in self.packages for job in arm.jobs.values()):
            raise RuntimeError("a call of it did not compile")
        files = {name: self.packages[job] for name, job in arm.jobs.items()}
        kernels = {"frame": open_kernel("products" if self.is_gpu else "sdpa", None)}
        regions = VaeRegions(
            files, arm.sizes, arm.video.geometry, arm.dtype, arm.part, kernels, self.device
        )
        return regions.bind(self.stored(arm))

    def engine(self, arm: Arm, rounds: int = ROUNDS) -> Tensor:
        """Measure an engine; what it gives is returned: pixels, or means."""
        bound, given = self.open(arm), self.clip(arm.video, arm.part)
        name = {"decode": "frames", "encode": "mean"}[arm.part]

        def whole() -> None:
            clip = bound.clip()
            for written in (*clip.feed(given), *clip.finish()):
                written[name].cpu()

        def first() -> None:
            next(bound.clip().feed(given[:1]))[name].cpu()

        whole()
        self.wait()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.is_gpu else 0
        seconds = self.timed(whole, rounds, warm=0)
        peak = torch.cuda.max_memory_allocated() - before if self.is_gpu else 0
        began = self.timed(first)
        flops = self.flops(arm)
        self.tell(
            arm.video, f"engine {arm.name}", seconds, peak=peak,
            more=f"first frame after {began:.3f} s; {flops / seconds / 1e12:.0f} TF/s",
        )  # fmt: skip
        clip = bound.clip()
        kept = {"decode": "pixels", "encode": "mean"}[arm.part]
        return torch.cat([w[kept].cpu() for w in (*clip.feed(given), *clip.finish())])

    def flops(self, arm: Arm) -> float:
        """Of decoding the whole video, or about of encoding it."""
        if arm.part == "decode":
            return decoding_flops(arm.sizes, arm.video.geometry)
        later = arm.video.geometry.latent[0] - 0.75
        return later * steady_flops(arm.sizes, arm.video.geometry, arm.part)

    def tell(
        self, video: Video, what: str, seconds: float, *, peak: int = 0, more: str = ""
    ) -> None:
        """Say and keep a result."""
        told = f"{video.name}: {what}: {seconds:.3f} s"
        told += f", peak {peak / 2**30:.2f} GiB beside the weights" if peak else ""
        self.clock.say(told + (f"; {more}" if more else ""))
        self.results.append(
            {"video": video.name, "what": what, "seconds": seconds, "peak": peak, "more": more}
        )

    def product_rate(self) -> float:
        """FLOP/s of a bf16 product."""
        size = PRODUCT if self.is_gpu else 256
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in "ab")
        rate = 2 * size**3 / self.timed(lambda: a @ b, rounds=10, warm=3)
        self.clock.say(f"product of {size}^3 in bf16: {rate / 1e12:.0f} TF/s")
        return rate

    def floor(self, video: Video, chunk: int, rate: float) -> None:
        """Each convolution of decoding by itself, as the engine calls it, and their sum."""
        counts: Counter[tuple[Any, ...]] = Counter()
        for kind, x, kernel in _convolutions(video.sizes(chunk), video.geometry, chunk):
            counts[kind, x, kernel] += 1
        total = flops = 0.0
        for (kind, x, kernel), count in counts.items():
            given = torch.randn(x, device=self.device).bfloat16()
            weight = torch.randn(kernel, device=self.device).bfloat16()
            padding = kernel[2] // 2

            def once(g: Tensor = given, w: Tensor = weight, p: int = padding) -> Tensor:
                return convolution(g, w, padding=p, tf32=False)

            seconds = self.timed(once, rounds=3)
            frames = x[0] - kernel[1] + 1
            own = 2.0 * frames * x[1] * x[2] * kernel[0] * kernel[1] * kernel[2] ** 2 * x[3]
            total += count * seconds
            flops += count * own
            tried = self._tried(given, weight, padding) if self.is_gpu else float("nan")
            self.clock.say(
                f"  {kind:9} x {list(x)} kernel {list(kernel)} x{count}: {seconds * 1e3:.2f} ms, "
                f"{own / seconds / 1e12:.0f} TF/s; tried by cuDNN {tried * 1e3:.2f} ms"
            )
            del given, weight, once
        chunks = (video.geometry.latent[0] - 1) / chunk
        whole = decoding_flops(video.sizes(chunk), video.geometry)
        self.clock.say(
            f"{video.name}: convolutions alone, k={chunk}: {total * chunks:.3f} s in "
            f"{chunks:.1f} chunks, {flops / total / 1e12:.0f} TF/s; all {whole / 1e12:.0f} TFLOP "
            f"at the product's rate: {whole / rate:.3f} s"
        )

    def layouts(self, video: Video) -> None:
        """The widest picture's convolution in fp32: channels last or first, TF32 or not."""
        place = part_layers(video.sizes(1), video.geometry, "decode", 1)[-1]
        width = place.layer.inner
        given = torch.randn(1, width, 6, place.height, place.width, device=self.device)
        weight = torch.randn(width, width, 3, 3, 3, device=self.device)
        flops = 2 * 27 * 4 * place.height * place.width * width**2
        if not self.is_gpu:
            return
        for form in (torch.channels_last_3d, torch.contiguous_format):
            x, kernel = (t.contiguous(memory_format=form) for t in (given, weight))
            for tf32 in (False, True):
                seconds = self.timed(
                    partial(
                        torch.ops.aten.cudnn_convolution, x, kernel, [0, 1, 1], [1] * 3, [1] * 3,
                        1, False, True, tf32,
                    )
                )  # fmt: skip
                self.clock.say(
                    f"  fp32 {width} channels, {form}, tf32 {tf32}: {seconds * 1e3:.2f} ms, "
                    f"{flops / seconds / 1e12:.0f} TF/s"
                )

    def _tried(self, x: Tensor, weight: Tensor, padding: int) -> float:
        """The same with the fastest of cuDNN's kernels, and not the one that it holds to be."""
        ones, sides = [1, 1, 1], [0, padding, padding]
        given, kernel = x.permute(3, 0, 1, 2)[None], weight.permute(0, 4, 1, 2, 3)
        if weight.shape[1] == 1:
            given, kernel = x.permute(0, 3, 1, 2), weight[:, 0].permute(0, 3, 1, 2)
            ones, sides = [1, 1], [padding] * 2
        return self.timed(
            lambda: torch.ops.aten.cudnn_convolution(
                given, kernel, sides, ones, ones, 1, True, False, False
            )
        )

    def profile(self, arm: Arm) -> None:
        """The kernels of a steady chunk by their time."""
        from torch.profiler import ProfilerActivity, profile

        bound, given = self.open(arm), self.clip(arm.video, arm.part)
        steps = bound.clip().feed(given.repeat(2, 1, 1, 1))
        for _ in range(2):
            next(steps)
        self.wait()
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_gpu
        began = time.perf_counter()
        with profile(activities=kinds) as found:
            next(steps)
            self.wait()
        seconds = time.perf_counter() - began
        rows = [(e.key, e.self_device_time_total / 1e3, e.count) for e in found.key_averages()]
        rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
        total = sum(row[1] for row in rows)
        self.clock.say(
            f"{arm.video.name}: a steady chunk of {arm.name}: {seconds * 1e3:.1f} ms of wall "
            f"clock under the profiler, {total:.1f} ms of kernels"
        )
        kinds_of = Counter[str]()
        for key, milliseconds, _ in rows:
            kinds_of[_kind(key)] += milliseconds
        for kind, milliseconds in kinds_of.most_common():
            self.clock.say(f"  {kind}: {milliseconds:.1f} ms, {milliseconds / total:.0%}")
        for key, milliseconds, count in rows[:SHOWN]:
            self.clock.say(f"  {milliseconds:8.2f} ms x{count:<3} {key[:130]}")

    def diffusers(
        self,
        video: Video,
        part: str,
        dtype: torch.dtype,
        *,
        what: str,
        tf32: bool = True,
        rounds: int = 2,
        last: bool = False,
        compiled: bool = False,
    ) -> Tensor:
        """diffusers' model; what it gives is returned. last has its kernels channels-last."""
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            model: Any = AutoencoderKLWan(**video.diffusers_config)
        tensors = {name: t.to(dtype) for name, t in self.tensors(video).items()}
        model.load_state_dict(tensors, assign=True)
        model.eval().requires_grad_(False)
        if last:
            for module in model.modules():
                if isinstance(module, torch.nn.Conv3d):
                    module.to(memory_format=torch.channels_last_3d)
        if compiled:
            model.decoder = torch.compile(model.decoder)
        channels = video.sizes().channels
        rows = (video.diffusers_config[name] for name in ("latents_mean", "latents_std"))
        mean, std = (torch.tensor(r, device=self.device).view(1, channels, 1, 1, 1) for r in rows)
        batch = self.clip(video, part).permute(3, 0, 1, 2)[None]

        def work() -> Tensor:
            with torch.no_grad():
                if part == "encode":
                    moments = model.encode(batch.to(dtype), return_dict=False)[0].mode()
                    found = (moments.float() - mean) / std
                else:
                    given = (batch * std + mean).to(dtype)
                    found = model.decode(given, return_dict=False)[0]
            return found[0].permute(1, 2, 3, 0)

        torch.backends.cudnn.allow_tf32 = tf32
        try:
            if not rounds:
                return work().float().cpu()
            began = time.perf_counter()
            result = work().float().cpu()
            opening = time.perf_counter() - began
            if self.is_gpu:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if self.is_gpu else 0
            seconds = self.timed(lambda: work().cpu(), rounds, warm=0)
            peak = torch.cuda.max_memory_allocated() - before if self.is_gpu else 0
            self.tell(
                video, f"diffusers {part} {what}", seconds, peak=peak,
                more=f"first call {opening:.1f} s",
            )  # fmt: skip
            return result
        finally:
            torch.backends.cudnn.allow_tf32 = True

    def errors(self, what: str, found: Tensor, reference: Tensor) -> list[float]:
        """Relative L2 of the whole clip and of its frames."""
        off = [_error(a, b) for a, b in zip(found, reference)]
        self.clock.say(
            f"  {what}: relative L2 {_error(found, reference):.3e}, frames {min(off):.3e} to "
            f"{max(off):.3e}, first {off[0]:.3e}, last {off[-1]:.3e}"
        )
        return off


def _error(found: Tensor, reference: Tensor) -> float:
    distance = (found.double() - reference.double()).norm()
    return float(distance / reference.double().norm())


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


def compare(bench: Bench, video: Video, own: Mapping[str, Tensor]) -> None:
    """The errors of decoding against fp32 without TF32, beside those of diffusers in bf16."""
    clock = bench.clock
    reference = bench.diffusers(
        video, "decode", torch.float32, what="fp32 without TF32", tf32=False, rounds=1
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
    clock.arm("profile", 10, 40, partial(bench.profile, decode[0]))
    clock.arm("convolutions", 20, 60, partial(bench.floor, main_video, chunks[0], rate))
    clock.arm("layouts", 20, 40, partial(bench.layouts, main_video))
    clock.arm(largest.name, 20, 60, partial(bench.engine, largest))
    clock.arm(residual.name, 30, 60, partial(bench.engine, residual, rounds=2))
    clock.arm("profile", 30, 40, partial(bench.profile, residual))
    pixels = clock.arm(exact.name, 40, 60, partial(bench.engine, exact, rounds=1))
    own |= {} if pixels is None else {f"engine {exact.name}": pixels}
    clock.arm("errors", 40, 90, partial(compare, bench, main_video, own))
    for arm in encode:
        clock.arm(arm.name, 25, 60, partial(bench.engine, arm, rounds=1))
    half = torch.bfloat16
    for needs, part, dtype, what, how in (
        (15, "decode", torch.float32, "fp32 as PyTorch runs it", {}),
        (15, "encode", torch.float32, "fp32 as PyTorch runs it", {}),
        (15, "decode", half, "bf16, kernels channels-last", {"last": True}),
        (75, "decode", half, "bf16 compiled", {"compiled": True}),
    ):
        work = partial(bench.diffusers, main_video, part, dtype, what=what, **how)
        clock.arm(f"diffusers {what}", needs, 2 * needs, work)


def main() -> None:
    """Print the tables, and write them as JSON where $OUT names a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=360)
    asked = parser.parse_args()
    device = "cpu" if asked.tiny else "cuda:0"
    clock = Clock(asked.seconds)
    name = "a CPU" if asked.tiny else torch.cuda.get_device_name()
    clock.say(f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    with TemporaryDirectory() as folder:
        bench = Bench(device, clock, Path(folder))
        run(bench, asked.tiny)
    clock.say("done")
    print(json.dumps(bench.results))


if __name__ == "__main__":
    main()
