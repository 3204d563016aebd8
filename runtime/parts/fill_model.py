"""Give a model that was built on the meta device a checkpoint's tensors, where they are used.

On a CPU they stay mapped to their files, but for what is cast, or is fp32 and lies unaligned. To a
GPU they are read by several threads, through pinned memory and into one buffer, and cast there.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from wanexport.runtime.bundle.piece_reading import THREADS, Piece, pieces_of, read_pieces
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.parts.stored import StoredTensor
from wanexport.runtime.parts.torch_checkpoint import check_fit

_ALIGNMENT = 256  # bytes: what PyTorch's allocator gives at least on a GPU
_CACHE_LINE = 64  # bytes: what it gives on a CPU

Model = TypeVar("Model", bound=nn.Module)


class Place(NamedTuple):
    """Where a checkpoint has a parameter: in this tensor, or in this part of its rows."""

    name: str
    part: int = 0
    parts: int = 1


def parameters_in(
    stored: Mapping[str, StoredTensor],
    model: nn.Module,
    place_of: Callable[[str], Place],
    path: Path,
    *,
    others: bool,
) -> dict[str, StoredTensor]:
    """The model's parameters in a checkpoint, which has them at their places.

    others: whether the checkpoint may have tensors that are no parameters. `path` is named in
    errors. Raises BundleError when a tensor is missing, unexpected, not of the model's shape or
    not fp32, bf16 or fp16.
    """
    places = {name: place_of(name) for name in model.state_dict()}
    shapes = {
        places[name].name: (value.shape[0] * places[name].parts, *value.shape[1:])
        for name, value in model.state_dict().items()
    }
    found = {
        name: tensor.shaped(shapes[name]) if name in shapes else tensor
        for name, tensor in stored.items()
        if name in shapes or not others
    }
    check_fit(shapes, {name: each.tensor for name, each in found.items()}, type(model), path)
    return {name: found[place.name].rows(place.part, place.parts) for name, place in places.items()}


def fill_model(
    model: Model, tensors: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype
) -> Model:
    """The model with its tensors on a device in one dtype, for inference.

    Raises BundleError when a file was changed since it was opened or cannot be read, and
    torch.OutOfMemoryError.
    """
    if device.type == "cpu":
        values = {name: _on_cpu(stored.tensor, dtype) for name, stored in tensors.items()}
    else:
        values = read_to(device, tensors, dtype)
    model.load_state_dict(values, assign=True)
    return model.eval().requires_grad_(False)


def _on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype: a copy where it is cast, and of fp32 that is not aligned.

    The order in which fp32 products are summed depends on the alignment of the matrix.
    """
    tensor = tensor.to(dtype)
    is_aligned = tensor.data_ptr() % _CACHE_LINE == 0
    return tensor if is_aligned or dtype != torch.float32 else tensor.clone()


def read_to(
    device: torch.device, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors on a device, in one buffer. Raises as fill_model does."""
    files: dict[PinnedFile, list[Piece]] = defaultdict(list)
    # Of a caller in inference mode, other threads could not write it.
    with torch.inference_mode(False):
        values = _buffer(device, tensors, dtype)
        for name, stored in tensors.items():
            if stored.file is None:
                values[name].copy_(stored.tensor)
            else:
                files[stored.file] += pieces_of(
                    name, stored.offset, values[name], stored.tensor.dtype
                )
    if device.type == "cuda":  # what still reads this memory, freed before, must end first
        torch.cuda.synchronize(device)
    for file, pieces in files.items():
        with file.opened() as descriptor, ThreadPoolExecutor(THREADS) as pool:
            read = partial(read_pieces, descriptor, file.path)
            list(pool.map(read, [pieces[i::THREADS] for i in range(THREADS)]))
    return values


def _buffer(
    device: torch.device, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Room for the tensors on a device, each aligned."""
    step = _ALIGNMENT // dtype.itemsize
    shapes = {name: stored.tensor.shape for name, stored in tensors.items()}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-prod(shape) // step) * step
    buffer = torch.empty(end, dtype=dtype, device=device)
    return {
        name: buffer[starts[name] : starts[name] + prod(shape)].view(shape)
        for name, shape in shapes.items()
    }
