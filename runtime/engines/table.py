"""The backends whose engines can be run, by name: what is known of each before it is imported."""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, cast

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.engine import Engine, EngineOptions


class Backend(Protocol):
    """The module that runs one backend's engines."""

    @property
    def OPTIONS(self) -> frozenset[str]:
        """Which options of how to open an engine it takes; any other is refused."""

    def import_library(self, backend: str) -> None:
        """Import what runs the engines. Raises BundleError when it is missing."""

    def refusal(
        self, record: EngineRecord, device: str, options: EngineOptions, rebuild: str
    ) -> str:
        """Why this machine cannot execute the engine on a device; empty when it can."""

    def open_engines(
        self,
        record: EngineRecord,
        files: Mapping[str, PinnedFile],
        weights: Callable[[], Mapping[str, PinnedFile]],
        options: EngineOptions,
        device: str,
    ) -> Mapping[str, Engine]:
        """The engine of each expert, whose weights' files are asked for when they are needed."""


class Kind(NamedTuple):
    """One backend: its module, whether that needs PyTorch, and where and how well it runs.

    `preferred` are devices and dtypes, the best first; an engine that is `portable` runs on any of
    these devices, another on its target's. Where it has `own_memory`, it takes memory of a GPU that
    PyTorch does not count.
    """

    module: str
    preferred: tuple[tuple[str, str], ...]
    needs_torch: bool = True
    portable: bool = False
    own_memory: bool = False

    def backend(self) -> Backend:
        """The module, imported. Raises BundleError as its imports do."""
        return cast(Backend, importlib.import_module(f"wanexport.runtime.engines.{self.module}"))


_ON_GPU = (("cuda", "bf16"), ("cuda", "fp16"), ("cuda", "fp32"))
ENGINES = {  # the fastest on a GPU first
    "aoti": Kind("aoti", (*_ON_GPU, ("cpu", "fp32"), ("cpu", "bf16"), ("cpu", "fp16"))),
    "tensorrt": Kind("tensorrt", _ON_GPU, own_memory=True),
    "tensorrt-rtx": Kind("tensorrt", _ON_GPU, own_memory=True),
    "onnx": Kind(
        "onnx",
        (*_ON_GPU, ("cpu", "fp32"), ("cpu", "fp16")),
        needs_torch=False,
        portable=True,
        own_memory=True,
    ),
}
BACKENDS = ("onnx", "aoti", "tensorrt", "tensorrt-rtx")  # as help and messages list them
