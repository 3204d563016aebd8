"""The arms of `bench`: what each of them runs, and with which options.

What an arm does not need is not imported at the top: importing is part of its cold start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.errors import BadRequest

LEAST_ROUNDS = 5  # of which a median says something
_OF_ALL = frozenset({"device", "resolution", "frames", "chunk", "cache", "dtype", "weights"})


@dataclass(frozen=True)
class Arm:
    """The engine of a backend; where that is None, eager code of the same model: its peer.

    The peer is `graph` or `diffusers`, and `compiles` the mode in which torch.compile compiles it.
    `attention` is the kernel of an engine that has a choice, or that a peer is held to on a GPU.
    """

    name: str
    backend: str | None = None
    peer: str | None = None
    attention: str | None = None
    compiles: str | None = None


ARMS = {
    arm.name: arm
    for arm in (
        *(Arm(name, backend=name) for name in ENGINES),
        Arm("graph", peer="graph", attention="cudnn"),
        Arm("diffusers", peer="diffusers", attention="cudnn"),
        Arm("compile", peer="diffusers", attention="cudnn", compiles="default"),
    )
}
MACHINE = Arm("machine")  # whose matrix products are measured in the place of an arm


@dataclass(frozen=True)
class Job:
    """What the fresh process is told; all paths are absolute.

    `options` are the keywords of EngineOptions, device, dtype and shape among them. `weights` is
    the file that peers read. `spawned` is the wall clock when the process was started.
    """

    arm: Arm
    bundle: str
    options: dict[str, Any]
    geometry: dict[str, int]
    weights: str
    inputs: str  # safetensors file
    velocity: str  # safetensors file to write
    rounds: int
    profile: bool
    spawned: float

    @property
    def engine(self) -> EngineOptions:
        """Which engine is measured, opened how."""
        return EngineOptions(**self.options)

    @property
    def device(self) -> str:
        """PyTorch's name of the device of every arm."""
        device: str = self.options["device"]
        return device

    @property
    def dtype(self) -> str:
        """The precision of every arm."""
        dtype: str = self.options["dtype"]
        return dtype

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device != "cpu"


def find_arms(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, once each. Raises BadRequest for a name that no arm has."""
    for name in names:
        if name not in ARMS:
            raise BadRequest(f"unknown arm {name!r}: expected some of {', '.join(ARMS)}")
    return [ARMS[name] for name in dict.fromkeys(names)]


def options_taken(arm: Arm) -> frozenset[str]:
    """The names of the EngineOptions that an arm makes use of."""
    return _OF_ALL if arm.backend is None else _OF_ALL | ENGINES[arm.backend].backend().OPTIONS


def options_of(arm: Arm, options: EngineOptions) -> EngineOptions:
    """How an arm's engine is chosen and opened: as asked, as far as its backend has the options."""
    own = replace(options, backend=arm.backend, attention=arm.attention or options.attention)
    taken = {"backend", *options_taken(arm)}
    return EngineOptions(**{name: v for name, v in own.given().items() if name in taken})


def peer_kernel(arm: Arm, options: EngineOptions) -> str | None:
    """The attention kernel that a peer is held to: none on a CPU and in fp32."""
    return None if options.device == "cpu" or options.dtype == "fp32" else arm.attention


def kernel_shown(arm: Arm, options: EngineOptions, engine: EngineRecord | None) -> str | None:
    """The kernel or operator of self-attention that an arm runs, as far as it is known."""
    if engine is None:
        return peer_kernel(arm, options)
    recorded = getattr(engine.details, "attention", None)
    built = recorded.get("self") if isinstance(recorded, Mapping) else recorded
    return options_of(arm, options).attention or built
