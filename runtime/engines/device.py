"""The device that an engine runs on: its name, and what PyTorch raises there in one line."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.program import ENGINE_DTYPE, NUMBER_OF_KEYS, Program, TensorSpec

_LAUNCH_BOUND = 0.7  # of the GPU's time: when a launch takes more, a CUDA graph pays


def gpu_or_cpu(device: str) -> torch.device:
    """The device of a name, `cpu`, `cuda` (the current GPU) or `cuda:1`.

    Raises EngineFailure when it is not there.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineFailure("there is no CUDA device here; choose --device cpu")
    index = torch.device(device).index
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise EngineFailure(f"there is no {device} here: expected cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def room_on(device: torch.device) -> int:
    """Bytes that PyTorch can still get on a GPU: what is free there and in its own cache, within
    the share that `torch.cuda.set_per_process_memory_fraction` leaves the process."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return unreserved_on(device) + kept


def unreserved_on(device: torch.device) -> int:
    """The same without what is in PyTorch's cache."""
    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free, share - torch.cuda.memory_reserved(device)))


def launch_bound(launch_seconds: float, gpu_seconds: float) -> bool:
    """Whether the launch of GPU work takes so much of its time that a CUDA graph pays."""
    return launch_seconds > _LAUNCH_BOUND * gpu_seconds > 0


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which graphs are captured: PyTorch keeps a cuBLAS workspace for each
    that was ever used, and its own one is on the GPU of the process's first capture."""
    return torch.cuda.Stream(device)


def to_device(value: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the device, contiguous; the host does not wait for a copy to a GPU."""
    tensor = (value if isinstance(value, Tensor) else torch.from_numpy(value)).detach()
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A copy of pageable memory, and of another dtype, begins when the GPU's work has ended.
        tensor = tensor.to(dtype).pin_memory()
    # A copy to the host that nobody waits for would be read before it is there.
    return tensor.to(device, dtype, non_blocking=device.type == "cuda").contiguous()


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of our name, as `bf16` or `I64`."""
    dtype: torch.dtype = getattr(torch, DTYPES[name].torch)
    return dtype


def blank_inputs(specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeros, which of whole numbers are places that every model has; but a forward attends to at
    least one token."""
    return {
        name: torch.full(
            spec.shape,
            int(name == NUMBER_OF_KEYS),
            dtype=torch_dtype(spec.dtype),
            device=device,
        )
        for name, spec in specs.items()
    }


def zero_state(program: Program, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The state of a session that has not begun, where the engine's precision is dtype."""
    with torch.inference_mode(False):  # of a caller in it, calls outside it could not write them
        return {
            name: torch.zeros(
                spec.shape,
                dtype=dtype if spec.dtype == ENGINE_DTYPE else torch_dtype(spec.dtype),
                device=device,
            )
            for name, spec in program.states().items()
        }


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Run on a device; what PyTorch raises there becomes an EngineFailure of one line."""
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    except RuntimeError as error:  # a package does not say of what kind
        reason = " ".join(str(error).split())[:160]
        likely = "" if re.search("out ?of ?memory", reason, re.IGNORECASE) else " most likely"
        raise EngineFailure(
            f"the engine failed on {device} ({reason}), for want of memory{likely}: close what "
            f"else uses it, or build an engine of a smaller --resolution or fewer --frames"
        ) from error
