"""The arms of `vae_speed`: which VAE, which video, which engine, and the time that is left."""

import gc
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tests.oracles.official_vae import GOLDEN
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.parts.vae_keys import config_of
from wanexport.runtime.vae_config import VaeConfig


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
            free()


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("it took too long")


def free() -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
