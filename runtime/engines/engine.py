"""What every engine is to a denoiser, and which engine is asked for, opened how."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypedDict

from wanexport.runtime.arrays import Array
from wanexport.runtime.bundle.pinned_file import PinnedFile

CLOSED = "the engine was closed: load it again"
# How a GPU holds less than all weights: one expert of two, or the layers that are needed next.
OFFLOADS = ("experts", "blocks")


@dataclass
class Memory:
    """What a session keeps between calls of one engine.

    `state` is written in place, or replaced; `values` are what the calls of the prompt wrote with
    the weights of the file `weights`, None before the first call. `attended` is the number that the
    input `keys` has on the device, how many tokens of a cache the next calls attend to: with it an
    engine on a GPU takes a faster kernel. None where the caller does not know.
    """

    state: dict[str, Array] = field(default_factory=dict)
    values: dict[str, Array] | None = None
    weights: PinnedFile | None = None
    attended: int | None = None


class Engine(Protocol):
    """The Program of one expert on a device; fp32 arrays in and out."""

    @property
    def device(self) -> str:
        """PyTorch's name of the device: `cpu` or `cuda:1`."""

    def array(self, value: Array) -> Array:
        """A caller's array as the engine takes it: numpy, or a torch tensor on its device."""

    def memory(self) -> Memory:
        """What a new session keeps."""

    def __call__(
        self,
        inputs: Mapping[str, Array],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Array:
        """The velocity, with the weights of a file, None for those the engine has.

        Without memory every call runs, and the state is zeros. The moment `commit`, which a causal
        Program has, writes state and gives None. Raises EngineFailure when the device
        cannot, BundleError when the file is not what was pinned.
        """

    def use(self, weights: PinnedFile) -> None:
        """Read the weights of a file ahead of the next call, which waits for running ones.

        Raises as a call does; what the engine has then is what the next call asks for.
        """

    def close(self) -> None:
        """Let go of memory on the device; a call then raises EngineFailure."""


class EngineKeywords(TypedDict, total=False):
    """The fields of EngineOptions, as functions take them."""

    backend: str | None
    device: str | None
    resolution: str | tuple[int, int] | None
    frames: int | None
    chunk: int | None
    cache: int | None
    dtype: str | None
    provider: str | None
    weights: str | Path | None
    attention: str | None
    offload: str | None
    resident_blocks: int | None
    cuda_graph: bool | None
    provider_options: Mapping[str, str] | None


@dataclass(frozen=True)
class EngineOptions:
    """Which engine of a bundle, and how to open it; None is free. `load` says what each means."""

    backend: str | None = None
    device: str | None = None
    resolution: str | tuple[int, int] | None = None
    frames: int | None = None
    chunk: int | None = None
    cache: int | None = None
    dtype: str | None = None
    provider: str | None = None
    weights: str | Path | None = None
    attention: str | None = None
    offload: str | None = None
    resident_blocks: int | None = None
    cuda_graph: bool | None = None
    provider_options: Mapping[str, str] | None = None

    def given(self) -> dict[str, Any]:
        """The options that are not left at their default."""
        return {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default
        }
