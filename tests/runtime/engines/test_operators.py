"""The operators of exported graphs, and which kernel runs them."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from wanexport.exporter.backends.aoti import attention as attention_rule
from wanexport.exporter.backends.aoti.attention import _best, choose_kernels
from wanexport.exporter.build import build
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Geometry, WanExportError
from wanexport.runtime.bundle.signature import key_lengths
from wanexport.runtime.engines.kernels import kernel_obstacle
from wanexport.runtime.engines.operators import (
    attention,
    attention_kernels,
    linear_gelu,
    open_kernel,
    sdpa,
)
from wanexport.runtime.errors import WanExportWarning


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
        thread = Thread(target=lambda: elsewhere.append(attention(*qkv(7))))
        thread.start()
        thread.join()
    assert elsewhere[0].any()
    assert attention(*qkv(7)).any()


def test_a_number_of_keys_that_no_kernel_is_named_for_is_refused() -> None:
    with attention_kernels({7: sdpa, 9: sdpa}):
        with pytest.raises(WanExportError, match="no attention kernel is chosen for 5 keys, only "):
            attention(*qkv(5))
    with attention_kernels({}):
        assert attention(*qkv(5)).any()


@pytest.mark.parametrize(
    ("kernel", "arch", "dtype", "obstacle"),
    [
        *(("sdpa", arch, dtype, "") for arch in ("x86_64", "sm75") for dtype in ("fp32", "bf16")),
        *(("cudnn", arch, "bf16", "") for arch in ("sm80", "sm89", "sm90", "sm120")),
        *(("fa4", "sm90", dtype, "") for dtype in ("bf16", "fp16")),
        ("cudnn", "x86_64", "bf16", "cudnn runs on a GPU, not on cpu: choose sdpa"),
        ("fa4", "aarch64", "fp16", "fa4 runs on a GPU, not on cpu: choose sdpa"),
        ("cudnn", "sm90", "fp32", "cudnn runs in bf16 or fp16, not in fp32: choose sdpa"),
        ("fa4", "sm90", "fp32", "fa4 runs in bf16 or fp16, not in fp32: choose sdpa"),
        ("fa4", "sm100", "bf16", "fa4 runs on Hopper GPUs (sm90), not on sm100: choose cudnn"),
        ("fa4", "sm89", "bf16", "fa4 runs on Hopper GPUs (sm90), not on sm89: choose cudnn"),
        ("cudnn", "sm75", "fp16", "cudnn runs on sm80 and newer GPUs, not on sm75: choose sdpa"),
        ("fast", "sm90", "bf16", "unknown kernel 'fast': expected one of fa4, cudnn, sdpa"),
    ],
)
def test_each_kernel_runs_where_it_can(kernel: str, arch: str, dtype: str, obstacle: str) -> None:
    target = {"device": "cuda" if arch.startswith("sm") else "cpu", "arch": arch}
    assert kernel_obstacle(kernel, target, dtype) == obstacle


@pytest.mark.parametrize("attention", ["cudnn", "fa4"])
def test_a_build_refuses_a_kernel_before_any_work(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanexport.exporter.build.resolve", None)  # what reads the checkpoint
    with pytest.raises(WanExportError, match=f"attention: {attention} runs on a GPU, not on cpu"):
        build(
            "tiny", random_weights=0, resolution="64x96", frames=9, backends=["aoti"],
            device="cpu", attention=attention, output=tmp_path / "bundle",
        )  # fmt: skip
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], float | RuntimeError]:
    """A GPU of compute capability 9.0, and what timing a kernel at a number of keys gives."""
    times: dict[tuple[str, int], float | RuntimeError] = {}

    def time(config: object, queries: int, keys: int, dtype: str, kernel: Any) -> float:
        found = times[kernel.__name__, keys]
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(attention_rule, "_time", time)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return times


def test_a_kernel_that_is_asked_for_is_measured_alone(
    gpu: dict[tuple[str, int], float | RuntimeError],
) -> None:
    gpu |= {("cudnn", 72): 2.0, ("cudnn", 512): 1.0, ("sdpa", 512): 0.5}
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(64, 96, 9)
    chosen, seconds = choose_kernels(config, geometry, "bf16", "cuda", None, "cudnn")
    assert chosen == {"72": "cudnn", "512": "sdpa"}
    assert seconds == {"72": {"cudnn": 2.0}, "512": {"cudnn": 1.0, "sdpa": 0.5}}


def test_a_kernel_that_does_not_run_is_left_out_aloud(
    gpu: dict[tuple[str, int], float | RuntimeError],
) -> None:
    gpu |= {(name, keys): 1.0 for name in ("cudnn", "sdpa") for keys in (72, 512)}
    gpu["cudnn", 72] = RuntimeError("CUDA out of memory.\nTried to")
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(64, 96, 9)
    with pytest.warns(WanExportWarning, match=r"72 keys is chosen without cudnn, .*out of memory"):
        chosen, _ = choose_kernels(config, geometry, "bf16", "cuda", None)
    assert chosen == {"72": "sdpa", "512": "cudnn"}


def test_fp32_on_a_gpu_has_one_kernel(gpu: object) -> None:
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(64, 96, 9)
    chosen, seconds = choose_kernels(config, geometry, "fp32", "cuda", Path("library"))
    assert chosen == {"72": "sdpa", "512": "sdpa"} and not seconds


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
