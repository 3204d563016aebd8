"""Arrays of either kind: numpy's, or torch's without importing it."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from wanexport.runtime.errors import BadRequest

Array = Any  # a numpy array or a torch tensor


def is_torch(value: Any) -> bool:
    """Whether value is a torch tensor, of a subclass too, without importing torch."""
    # Nothing is one before somebody imported it; while somebody does, it has no Tensor yet.
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def to_numpy(value: Array) -> np.ndarray:
    """An fp32 numpy array of a number, an array or a torch tensor on any device.

    Raises BadRequest for anything else.
    """
    try:
        plain = value.detach().float().cpu().numpy() if is_torch(value) else value
        return np.ascontiguousarray(plain, np.float32)
    except (TypeError, ValueError, NotImplementedError) as error:  # the last of a meta tensor
        raise BadRequest(
            f"{type(value).__name__} is no array of numbers: pass numpy arrays or torch tensors"
        ) from error


def is_on_gpu(value: Any) -> bool:
    """Whether value is a torch tensor on a CUDA device."""
    return is_torch(value) and bool(value.is_cuda)


def is_finite(value: Array) -> bool:
    """Whether no element is NaN or Inf; waits for the device of a tensor on a GPU."""
    if is_torch(value):
        return bool(value.isfinite().all())
    return bool(np.isfinite(value).all())


def count_not_finite(value: Array) -> int:
    """How many elements are NaN or Inf; 0 for a tensor on a GPU, which would have to be awaited."""
    if is_on_gpu(value):
        return 0
    with np.errstate(all="ignore"):
        if np.isfinite(np.sum(value)):  # one pass, which tells that there is none
            return 0
    return int((~np.isfinite(value)).sum())


def like(array: Array, model: Array) -> Array:
    """array as the kind that model is: numpy, or torch on model's device; always fp32."""
    if not is_torch(model):
        return to_numpy(array)
    import torch

    tensor = array if is_torch(array) else torch.from_numpy(array)
    # What comes from a GPU to the host must be there when it is returned.
    return tensor.to(model.device, non_blocking=is_on_gpu(model))


def to_fp32_like(value: Array, model: Array) -> Array:
    """value in fp32, as the kind that model is: numpy, or torch on model's device."""
    if is_torch(value) and is_torch(model):
        return value.to(model.device, non_blocking=is_on_gpu(model)).float()
    return like(to_numpy(value), model)


def concatenated(arrays: Sequence[Array], axis: int) -> Array:
    """Arrays of one kind as one along an axis."""
    if not is_torch(arrays[0]):
        return np.concatenate(arrays, axis)
    import torch

    return torch.cat(list(arrays), axis)


def whole_numbers_like(parts: Sequence[Sequence[int]], model: Array) -> list[Array]:
    """int64 arrays of the kind that model is: numpy, or torch on model's device.

    To a GPU all go as one copy from pinned memory, for which the host does not wait. Each begins
    at a multiple of 16 bytes, as compiled code may expect of a tensor.
    """
    if not is_torch(model):
        return [np.array(part, np.int64) for part in parts]
    import torch

    width = 2 * -(-max(map(len, parts)) // 2)
    rows = torch.zeros(len(parts), width, dtype=torch.int64, pin_memory=model.is_cuda)
    for row, part in zip(rows, parts):
        row[: len(part)] = torch.tensor(part)
    placed = rows.to(model.device, non_blocking=True)
    return [row[: len(part)] for row, part in zip(placed, parts)]
