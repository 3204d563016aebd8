"""Attention to the first keys of a cache, whose number a tensor has, and perhaps the host too."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from wanexport.runtime.engines.cached_kernels import attending_to, mask, to_prefix
from wanexport.runtime.engines.operators import (
    attention_kernels,
    cached_attention,
    open_kernel,
    sdpa,
)
from wanexport.runtime.errors import BadRequest

QUERIES, KEYS, HEADS, WIDTH = 5, 12, 2, 8


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, HEADS, WIDTH) for n in (QUERIES, KEYS, KEYS))
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """A softmax over the first keys, in fp64."""
    q, k, v = (x[0].double() for x in (q, k[:, :count], v[:, :count]))
    scores = torch.einsum("qhd,khd->hqk", q, k) / WIDTH**0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)[None].float()


@pytest.mark.parametrize("count", [1, 5, KEYS])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "kernel", [None, mask, to_prefix(sdpa), open_kernel("sdpa", None, "cache")]
)
def test_the_first_keys_are_attended_to(kernel: Any, told: bool, count: int) -> None:
    q, k, v = tensors()
    expected = plain(q, k, v, count)
    k[:, count:], v[:, count:] = 100, 1000
    with attention_kernels({"cache": kernel} if kernel else {}):
        with attending_to(count if told else None):
            found = cached_attention(q, k, v, torch.tensor([count]), "cache")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_view_of_the_keys_looks_like_a_tensor_by_itself() -> None:
    seen = []

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((k.shape, k.stride(), k.data_ptr(), v.is_contiguous()))
        return q

    q, k, v = tensors()
    to_prefix(look)(q, k, v, torch.tensor([7]))
    shape = torch.empty(1, 7, HEADS, WIDTH)
    assert seen == [(shape.shape, shape.stride(), k.data_ptr(), True)]


def test_what_one_thread_says_another_does_not_hear() -> None:
    q, k, v = tensors()
    keys = torch.tensor([3])
    with attending_to(KEYS), ThreadPoolExecutor(1) as pool:
        other = pool.submit(cached_attention, q, k, v, keys, "cache").result()
        own = cached_attention(q, k, v, keys, "cache")
    torch.testing.assert_close(other, plain(q, k, v, 3), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(own, plain(q, k, v, KEYS), atol=1e-6, rtol=1e-5)


def test_a_cache_needs_a_kernel_of_its_own() -> None:
    with attention_kernels({"self": sdpa}), pytest.raises(BadRequest, match="of kind cache"):
        cached_attention(*tensors(), torch.tensor([3]), "cache")
    with pytest.raises(BadRequest, match="unknown attention kernel 'mask'"):
        open_kernel("mask", None)
    assert open_kernel("mask", None, "cache") is mask


def test_the_operator_is_traced_without_reading_the_number() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
            return cached_attention(q, k, v, keys, "cache")

    given = (*tensors(), torch.tensor([3]))
    program = torch.export.export(Attention(), given)
    for count in (3, 9):
        found = program.module()(*given[:3], torch.tensor([count]))
        torch.testing.assert_close(found, plain(*given[:3], count), atol=1e-6, rtol=1e-5)
