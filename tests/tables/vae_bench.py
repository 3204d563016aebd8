"""What `vae_speed` measures: engines as they are called, and diffusers' model beside them."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tables.vae_arms import Arm, Clock, Video
from wanexport.exporter.backends.aoti.compile import RegionJob
from wanexport.exporter.child.child import run_process
from wanexport.exporter.child.process import Lifeline
from wanexport.runtime.engines.operators import open_kernel
from wanexport.runtime.engines.vae_regions import BoundVae, VaeRegions
from wanexport.runtime.vae_memory import decoding_flops, steady_flops
from wanexport.runtime.wan_vae import GRAPH, computes_fp32, parameter_shapes

ROUNDS = 3
PRODUCT = 8192  # rows and columns of the product that tells the GPU's rate


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
                    run_process, "backends.aoti.compile", region, self.folder, lifeline=line,
                    environment={"TORCHINDUCTOR_COMPILE_THREADS": "2"},
                )  # fmt: skip
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

        kept = {"decode": "pixels", "encode": "mean"}[arm.part]
        clip = bound.clip()
        result = torch.cat([w[kept].cpu() for w in chain(clip.feed(given), clip.finish())])
        dtype = torch.uint8 if arm.part == "decode" else torch.float32
        host = torch.empty(result.shape, dtype=dtype, pin_memory=self.is_gpu)

        def whole() -> None:
            """As the codec does: each chunk is copied while the next is computed."""
            clip, done = bound.clip(), 0
            for written in chain(clip.feed(given), clip.finish()):
                own = written[name]
                host[done : done + len(own)].copy_(own, non_blocking=True)
                done += len(own)

        def first() -> None:
            next(bound.clip().feed(given[:1]))[name].cpu()

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
        return result

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
                    form = torch.channels_last_3d
                    module.weight.data = module.weight.data.contiguous(memory_format=form)
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
            began = time.perf_counter()
            result = work().float().cpu()
            opening = time.perf_counter() - began
            if not rounds:
                self.tell(video, f"diffusers {part} {what}, its first call", opening)
                return result
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
