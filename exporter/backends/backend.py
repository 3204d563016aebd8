"""One engine to build, what a backend gives back for it, and what every backend offers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wanexport.graphs.signature import forward_flops
from wanexport.runtime.bundle.details import AotiDetails, OnnxDetails, TensorRtDetails, VaeDetails
from wanexport.runtime.bundle.manifest import DENOISER, VAE, EngineRecord, engine_label
from wanexport.runtime.bundle.signature import layout_sha256, program_of
from wanexport.runtime.bundle.vae_signature import vae_layout_sha256
from wanexport.runtime.family import SamplingDefaults, family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.vae_memory import decoding_flops
from wanexport.runtime.wan_config import WanConfig
from wanexport.runtime.wan_vae import GRAPH as VAE_GRAPH
from wanexport.runtime.wan_vae import vae_program

Progress = Callable[[str, int, int], None]  # stage, done, total (0 when the length is unknown)


@dataclass(frozen=True)
class TensorRtOptions:
    """How TensorRT builds; None is its own default.

    targets are architectures (`sm89`), for TensorRT for RTX, which needs no GPU to build; workspace
    is in bytes, optimization_level 0 to 5. baked weights are constants of the plan instead of
    inputs. An engine without fused attention is refused unless allow_unfused.
    """

    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    bake_weights: bool = False
    allow_unfused: bool = False


Options = TensorRtOptions | None  # a backend's own; None where it takes none


@dataclass(frozen=True)
class Request:
    """One engine to build, every choice made by the backend's `resolve`.

    device is where it is made and proven, `cpu` or `cuda:1`; `target` is what the backend binds it
    to. attention is one of the backend's choices, None where its build measures them.
    """

    config: WanConfig
    geometry: Geometry
    sampling: SamplingDefaults
    backend: str
    dtype: str
    device: str
    target: dict[str, str]
    attention: str | None = None
    options: Options = None
    bakes: bool = False  # whether weights go into the engine
    baked: dict[str, str] = field(default_factory=dict)  # and then the hash of each expert's

    @property
    def role(self) -> str:
        """What the engine does."""
        return DENOISER

    @property
    def label(self) -> str:
        """Folder name, and prefix of progress messages."""
        return engine_label(self.backend, self.dtype, self.target, self.role)

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward; of a VAE, of decoding one video."""
        return forward_flops(self.config, self.geometry)

    @property
    def layout(self) -> str:
        """The layout of the weights file that the engine reads."""
        return layout_sha256(self.config, self.dtype)

    @property
    def program(self) -> Program:
        """The calls of the model at this geometry."""
        return program_of(self.config, self.geometry)

    @property
    def graph(self) -> str:
        """The module and class of the model's graph."""
        return family_of(self.config).graph


@dataclass(frozen=True, kw_only=True)
class VaeRequest(Request):
    """The engine of a model's VAE, of these sizes and chunks; dtype is that of decoding."""

    vae: VaeConfig

    @property
    def role(self) -> str:
        """What the engine does."""
        return VAE

    @property
    def flops(self) -> int:
        """Floating-point operations of decoding one video."""
        return decoding_flops(self.vae, self.geometry)

    @property
    def layout(self) -> str:
        """The layout of the weights file that the engine reads."""
        return vae_layout_sha256(self.vae, self.dtype)

    @property
    def program(self) -> Program:
        """The calls of the VAE at this geometry."""
        return vae_program(self.vae, self.geometry)

    @property
    def graph(self) -> str:
        """The module and class of the VAE's graph."""
        return VAE_GRAPH


@dataclass(frozen=True)
class Compiled:
    """An engine's files by role, and what its record says of them.

    One that is not whole lacks what could not be had this time, and is not taken for another build.
    """

    files: dict[str, Path]
    program: Program
    details: OnnxDetails | AotiDetails | VaeDetails | TensorRtDetails
    lint: dict[str, int]
    build: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = True


class Backend(Protocol):
    """A kind of engine, as `build` uses it: a module, or an object with the same functions."""

    @property
    def ATTENTION(self) -> tuple[str, ...]:
        """What `--attention` may name."""

    @property
    def BINDING(self) -> tuple[str, ...]:
        """What of a target an engine is bound to."""

    @property
    def OPTIONS(self) -> type | None:
        """The kind of Options that it takes."""

    @property
    def COMPILES(self) -> bool:
        """Whether it runs a C++ compiler and what that makes."""

    @property
    def SOURCES(self) -> tuple[str, ...]:
        """The modules that lower, compile or plan: what they import decides an engine's bytes."""

    def default_device(self) -> str:
        """The device that it can use best on this machine."""

    def default_dtype(self, device: str) -> str:
        """The precision of its engines on a device, unless another is asked for."""

    def libraries(self, request: Request) -> dict[str, str]:
        """Versions of what makes the engine."""

    def targets(self, device: str, options: Options) -> list[dict[str, str]]:
        """What engines are made for, one each. Raises WanExportError when none can be made."""

    def check_attention(self, attention: str | None, dtype: str, target: Mapping[str, str]) -> None:
        """Raise BadRequest when one of ATTENTION does not go with precision and target."""

    def resolve(self, request: Request) -> Request:
        """The request with every choice made. Raises BadRequest for a model that it cannot take."""

    def compile_engine(
        self, folder: Path, request: Request, weights: Mapping[str, Path], progress: Progress
    ) -> Compiled:
        """Write the engine's files in the folder; weights are files of the bundle by expert."""

    def prove(
        self,
        request: Request,
        engine: EngineRecord,
        bundle: Path,
        weights: Sequence[Path],
        verify: str,
    ) -> dict[str, Any]:
        """The figures of the proof. Raises WanExportError when it fails."""
