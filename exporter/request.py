"""One engine to build, and what a backend gives back for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from wanexport.graphs.config import WanConfig
from wanexport.graphs.weights import weights_layout
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.manifest import SamplingDefaults, engine_label

Progress = Callable[[str, int, int], None]  # stage, done, total (0 when the length is unknown)


@dataclass(frozen=True)
class Request:
    """One engine to build; `target` is what the backend binds it to on this machine."""

    config: WanConfig
    geometry: Geometry
    sampling: SamplingDefaults
    backend: str
    dtype: str
    target: dict[str, str]
    attention: str | None = None  # the kernel of self-attention; None for the fastest

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
        return sha256(weights_layout(self.config, self.dtype)[0]).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """An engine's files by role, and what its record says of them."""

    files: dict[str, Path]
    lint: dict[str, int]
    build: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
