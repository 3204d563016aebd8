"""The operators of exported graphs, and which kernel runs them."""

from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from wanexport.exporter.attention_rule import _best, choose_kernels
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Geometry, WanExportError
from wanexport.runtime.operators import attention, attention_kernels, linear_gelu, open_kernel
from wanexport.runtime.signature import key_lengths


def qkv(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 5, 2, 8), torch.randn(1, keys, 2, 8), torch.randn(1, keys, 2, 8)


@pytest.mark.parametrize("keys", [5, 7])
def test_attention_is_plain_maths(keys: int) -> None:
    q, k, v = (x.double().transpose(1, 2) for x in qkv(keys))
    exact = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(attention(*qkv(keys)), exact.transpose(1, 2).float())


def test_gelu_is_plain_maths() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3)
    y = x.double() @ weight.double().t() + bias.double()
    exact = y / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(linear_gelu(x, weight, bias), exact.float())


def test_the_kernel_follows_the_number_of_keys_within_the_block_and_thread() -> None:
    def zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    elsewhere: list[Tensor] = []
    with attention_kernels({7: zeros}):
        assert not attention(*qkv(7)).any()
        assert attention(*qkv(5)).any()
        thread = Thread(target=lambda: elsewhere.append(attention(*qkv(7))))
        thread.start()
        thread.join()
    assert elsewhere[0].any()
    assert attention(*qkv(7)).any()


def test_kernels_that_cannot_be_had() -> None:
    with pytest.raises(WanExportError, match="has no FlashAttention-4 kernel"):
        open_kernel("fa4", None)
    with pytest.raises(WanExportError, match="unknown attention kernel 'fast'"):
        open_kernel("fast", None)


def test_another_kernel_than_cudnn_must_be_clearly_faster() -> None:
    assert _best({"cudnn": 1.0, "sdpa": 0.97, "fa4": 1.2}) == "cudnn"
    assert _best({"cudnn": 1.0, "sdpa": 0.97, "fa4": 0.8}) == "fa4"
    assert _best({"sdpa": 2.0}) == "sdpa"
    with pytest.raises(WanExportError, match="no attention kernel runs at this shape"):
        _best({})


def test_a_cpu_has_one_kernel_for_every_length() -> None:
    config, geometry = PRESETS["flf2v-14b"].config, Geometry(64, 96, 9)
    assert key_lengths(config, geometry) == [72, 512, 514]
    chosen, seconds = choose_kernels(config, geometry, "bf16", "cpu", Path("unused"))
    assert chosen == {"72": "sdpa", "512": "sdpa", "514": "sdpa"} and not seconds
