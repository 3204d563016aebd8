"""An opened TensorRT plan: what it takes and gives, and contexts with every address set."""

import mmap
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.durable import remove_partials, write_durably
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.engines.device import on_device
from wanexport.runtime.engines.tensorrt_library import FLAVOURS, import_tensorrt, message_log
from wanexport.runtime.errors import (
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
    explain,
)
from wanexport.runtime.program import TensorSpec

OUTPUT = "velocity"


class Plan:
    """An opened plan: compiled code, and weights only where they were baked in.

    `tensors` has shape and dtype of every input and of the output by name; `activation_bytes` is
    what one execution takes beside them. TensorRT for RTX compiles kernels for the GPU that it
    finds: `kernels` is the file that keeps them, if any.
    Raises WanExportError when the plan cannot be opened here.
    """

    def __init__(
        self,
        flavour: str,
        file: Path | PinnedFile,
        device: torch.device,
        *,
        kernels: Path | None = None,
        version_compatible: bool = False,
    ) -> None:
        trt = import_tensorrt(flavour)
        self.title = FLAVOURS[flavour].title
        self.path = file.path if isinstance(file, PinnedFile) else file
        self.log = message_log(trt)
        with on_device(device):
            self.engine = engine = self._deserialize(trt, file, version_compatible)
            self.config = engine.create_runtime_config()
            self._kernels = _KernelCache(self.config, kernels) if kernels is not None else None
        self.activation_bytes = int(engine.device_memory_size_v2)
        self.weights_bytes = int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        self.tensors = _tensors(trt, engine)
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.config.set_execution_context_allocation_strategy(strategy)

    def _deserialize(self, trt: Any, file: Path | PinnedFile, version_compatible: bool) -> Any:
        self.log.clear()
        try:
            runtime = trt.Runtime(self.log)
        except TypeError as error:  # what the bindings make of a null pointer
            raise self.failure("start for") from error
        # A plan for later versions carries the code that executes it.
        runtime.engine_host_code_allowed = version_compatible
        with (
            pin(file).opened() as descriptor,
            mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content,
        ):
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self.failure("open")
        return engine

    def parameters(self, inputs: Mapping[str, TensorSpec]) -> list[str]:
        """What the plan takes beside these inputs; nothing where its weights were baked in."""
        return [name for name in self.tensors if name not in inputs and name != OUTPUT]

    def check(
        self,
        ends: Mapping[str, TensorSpec],
        weights: PinnedFile | None,
        *,
        reads_all: bool = True,
    ) -> None:
        """Raise WanExportError unless the plan takes and gives these and takes the tensors of this
        file, None where weights were baked in; all of them unless it reads only some."""
        # An input is more than a tensor, and equal to no plain one.
        expected = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in ends.items()}
        if weights is not None:
            with weights.opened():
                entries = read_header(weights.path)
            for name, entry in entries.items():
                if reads_all or name in self.tensors:
                    expected[name] = TensorSpec(entry.shape, STORED[entry.dtype].name)
        for name in sorted(expected.keys() | self.tensors.keys()):
            wanted, found = expected.get(name), self.tensors.get(name)
            if wanted != found:
                source = weights.path if weights and name not in ends else "the manifest"
                raise BundleError(
                    f"{self.path} has {_in_words(found)} for {name}, {source} has "
                    f"{_in_words(wanted)}: run wanexport build again"
                )

    def context(self, tensors: Mapping[str, Tensor], activations: Tensor) -> Any:
        """An execution context with the addresses of these tensors set, where the plan has them.

        Raises WanExportError when TensorRT refuses one.
        """
        self.log.clear()
        context = self.engine.create_execution_context(self.config)
        if context is None:
            raise self.failure("make a context for")
        context.set_device_memory(activations.data_ptr(), activations.nbytes)
        for name in self.tensors:
            if name in tensors:
                self.bind(context, name, tensors[name].data_ptr())
        return context

    def bind(self, context: Any, name: str, address: int) -> None:
        """Have a context find a tensor there. Raises WanExportError when TensorRT refuses it."""
        if not context.set_tensor_address(name, address):
            raise self.failure(f"bind {name} of")

    def execute(self, context: Any, stream: int) -> None:
        """Launch the plan on a stream, of this handle. Raises EngineFailure when it fails."""
        self.log.clear()
        if not context.execute_async_v3(stream):
            raise self.failure("execute")

    def save_kernels(self) -> None:
        """Keep what TensorRT for RTX compiled since the plan was opened."""
        if self._kernels is not None:
            self._kernels.save()

    def failure(self, what: str) -> WanExportError:
        """What TensorRT refused to do with the plan, in its own words."""
        reason = self.log.reason()
        cure = "build the engine again for this machine, or choose one of another --backend"
        if re.search("out ?of ?memory", reason, re.IGNORECASE):
            cure = (
                "close what else uses the GPU, or build an engine of a smaller --resolution or "
                "fewer --frames"
            )
        return EngineFailure(f"{self.title} cannot {what} {self.path} ({reason}): {cure}")


class _KernelCache:
    """What TensorRT for RTX compiled for this GPU, in a file; without it, it compiles again."""

    def __init__(self, config: Any, file: Path) -> None:
        self.file, self.cache = file, config.create_runtime_cache()
        try:
            self.saved = file.read_bytes()
        except OSError:  # there is none, or none that may be read
            self.saved = b""
        if self.saved and not self.cache.deserialize(self.saved):
            warnings.warn(
                f"{file} is damaged, or of another GPU or driver: kernels are compiled anew, and "
                f"it is replaced",
                WanExportWarning,
                stacklevel=2,
            )
        config.set_runtime_cache(self.cache)

    def save(self) -> None:
        memory = self.cache.serialize()  # null where there is nothing to keep
        content = b"" if memory is None else bytes(memory)
        if content in (b"", self.saved):
            return
        try:
            remove_partials(self.file.parent)
            write_durably(self.file, content)
        except (OSError, WanExportError) as error:  # without it, the engine serves all the same
            warnings.warn(
                f"the next load compiles anew: cannot write {explain(error)}",
                WanExportWarning,
                stacklevel=2,
            )
        self.saved = content


def _tensors(trt: Any, engine: Any) -> dict[str, TensorSpec]:
    """Shape and dtype of what a deserialised engine takes and gives."""
    dtypes = {
        getattr(trt.DataType, row.tensorrt): row.name for row in STORED.values() if row.tensorrt
    }
    tensors = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name)
        tensors[name] = TensorSpec(
            tuple(engine.get_tensor_shape(name)), dtypes.get(dtype, str(dtype))
        )
    return tensors


def _in_words(spec: TensorSpec | None) -> str:
    return "nothing" if spec is None else f"{list(spec.shape)} in {spec.dtype}"
