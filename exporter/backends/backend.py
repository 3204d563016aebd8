"""One engine to build, what a backend gives back for it, and what every backend offers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from wanexport.runtime.bundle.manifest import EngineRecord, SamplingDefaults, engine_label
from wanexport.runtime.bundle.signature import weights_header_sha256
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

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


@dataclass(frozen=True)
class Request:
    """One engine to build; `target` is what the backend binds it to."""

    config: WanConfig
    geometry: Geometry
    sampling: SamplingDefaults
    backend: str
    dtype: str
    target: dict[str, str]
    attention: str | None = None  # of the backend's choices; None for its own
    tensorrt: TensorRtOptions | None = None
    baked: dict[str, str] = field(default_factory=dict)  # expert -> hash of the weights inside

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self.target["device"]

    @property
    def label(self) -> str:
        """Folder name, and prefix of progress messages."""
        return engine_label(self.backend, self.dtype, self.target)

    @property
    def weights_header(self) -> str:
        """Hash of the header of the weights file that the engine reads."""
        return weights_header_sha256(self.config, self.dtype)


@dataclass(frozen=True)
class Compiled:
    """An engine's files by role, and what its record says of them.

    One that is not whole lacks what could not be had this time, and is not taken for another build.
    """

    files: dict[str, Path]
    lint: dict[str, int]
    build: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True


class Backend(Protocol):
    """A kind of engine, as `build` uses it: a module, or an object with the same functions."""

    @property
    def ATTENTION(self) -> tuple[str, ...]:
        """What `--attention` may name."""

    @property
    def BINDING(self) -> tuple[str, ...]:
        """What of a target an engine is bound to."""

    def code(self, device: str) -> tuple[ModuleType, ...]:
        """What decides an engine's bytes, beside the graph's own code."""

    def libraries(self, request: Request) -> dict[str, str]:
        """Versions of what makes the engine."""

    def targets(self, device: str, options: TensorRtOptions) -> list[dict[str, str]]:
        """What engines are made for, one each. Raises WanExportError when none can be made."""

    def check_attention(self, attention: str | None, dtype: str, target: Mapping[str, str]) -> None:
        """Raise WanExportError when one of ATTENTION does not go with precision and target."""

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
