"""Whether two results are the same to the bit."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def differing(expected: Any, found: Any) -> str | None:
    """What differs first between two nests of tensors and values; None where nothing does.

    NaN is NaN whatever its bits, and -0 is not 0.
    """
    one, other = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    if len(one) != len(other):
        return f"{len(other)} results, not {len(one)}"
    for i, (a, b) in enumerate(zip(one, other)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if reason := _tensors_differ(a, b):
                return f"result {i} {reason}"
        elif type(a) is not type(b) or a != b:
            return f"result {i} is {b!r:.40}, not {a!r:.40}"
    return None


def _tensors_differ(a: Tensor, b: Tensor) -> str | None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"is {b.dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}"
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if a.is_floating_point() and a.element_size() == 1:  # PyTorch compares none of fp8
        a, b = a.float(), b.float()
    unequal = a != b
    if a.is_floating_point():
        unequal = (unequal & ~(a.isnan() & b.isnan())) | (~a.isnan() & (a.signbit() != b.signbit()))
    count = int(unequal.sum())
    return f"differs in {count} of {a.numel()} numbers" if count else None
