"""The operators of exported graphs, and which kernel runs them."""

from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wanexport.exporter.backends.aoti import attention as attention_rule
from wanexport.exporter.backends.aoti.attention import _best, choose_kernels
from wanexport.exporter.build import build
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Geometry
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.engines.kernels import ATTENTION_KINDS, check_kernel, kernel_obstacle
from wanexport.runtime.engines.operators import (
    attention,
    attention_kernels,
    linear_gelu,
    open_kernel,
    sdpa,
)
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportWarning
from wanexport.runtime.program import Attention


def qkv(keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 5, 2, 8), torch.randn(1, keys, 2, 8), torch.randn(1, keys, 2, 8)


@pytest.mark.parametrize(("keys", "kind"), [(5, "self"), (7, "text"), (257, "image")])
def test_attention_is_plain_maths(keys: int, kind: str) -> None:
    q, k, v = (x.double().transpose(1, 2) for x in qkv(keys))
    exact = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(attention(*qkv(keys), kind), exact.transpose(1, 2).float())


def test_gelu_is_plain_maths() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3)
    y = x.double() @ weight.double().t() + bias.double()
    exact = y / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(linear_gelu(x, weight, bias), exact.float())


def zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A kernel that shows that it was called."""
    return torch.zeros_like(q)


def test_the_kernel_follows_the_kind_within_the_block_and_thread() -> None:
    """And not the number of keys, which is the same for all here."""
    elsewhere: list[Tensor] = []
    with attention_kernels({"text": zeros, "self": sdpa}):
        assert not attention(*qkv(5), "text").any()
        assert attention(*qkv(5), "self").any()
        thread = Thread(target=lambda: elsewhere.append(attention(*qkv(5), "text")))
        thread.start()
        thread.join()
        with attention_kernels({"text": sdpa}):
            assert attention(*qkv(5), "text").any()
        assert not attention(*qkv(5), "text").any()
    assert elsewhere[0].any()
    assert attention(*qkv(5), "text").any()


def test_a_kind_that_no_kernel_is_named_for_is_refused() -> None:
    with attention_kernels({"self": sdpa, "text": sdpa}):
        with pytest.raises(BadRequest, match="for attention of kind image, only for self, text: "):
            attention(*qkv(5), "image")
    with attention_kernels({}):
        assert attention(*qkv(5), "image").any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_unknown_kind_is_refused_where_it_runs_and_where_it_is_traced(device: str) -> None:
    with FakeTensorMode() if device == "meta" else nullcontext():
        given = qkv(5)
        assert all(attention(*given, kind).shape == (1, 5, 2, 8) for kind in ATTENTION_KINDS)
        with pytest.raises(BadRequest, match="unknown kind of attention 'camera': expected one of"):
            attention(*given, "camera")


def test_an_unknown_kind_is_refused_by_an_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, self.kind)

    program = torch.export.export(Model("image"), qkv(5), strict=False)
    (node,) = [node for node in program.graph.nodes if "attention" in str(node.target)]
    assert node.target is torch.ops.wanexport.attention.kind and node.args[3] == "image"
    with pytest.raises(Exception, match="unknown kind of attention 'camera'"):
        torch.export.export(Model("camera"), qkv(5), strict=False)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [(5, "self"), (7, "text"), (512, "text"), (257, "image"), (514, "image")],
)
def test_a_package_of_schema_1_gets_the_kernel_by_its_number_of_keys(keys: int, kind: str) -> None:
    kernels = {known: zeros if known == kind else sdpa for known in ATTENTION_KINDS}
    with attention_kernels(kernels):
        assert not torch.ops.wanexport.attention(*qkv(keys)).any()


def test_a_package_of_schema_1_with_257_tokens_attends_to_them_by_the_kernel_of_self() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 257, 2, 8)
    with attention_kernels({"self": zeros, "image": sdpa}):
        assert not torch.ops.wanexport.attention(q, q, q).any()


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
    check_kernel(None, target, dtype)
    if obstacle:
        with pytest.raises(BadRequest, match=r"^attention: .*, or leave it out$"):
            check_kernel(kernel, target, dtype)
    else:
        check_kernel(kernel, target, dtype)


@pytest.mark.parametrize("attention", ["cudnn", "fa4"])
def test_a_build_refuses_a_kernel_before_any_work(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanexport.exporter.build.resolve", None)  # what reads the checkpoint
    with pytest.raises(BadRequest, match=f"attention: {attention} runs on a GPU, not on cpu"):
        build(
            "tiny", random_weights=0, resolution="64x96", frames=9, backends=["aoti"],
            device="cpu", attention=attention, output=tmp_path / "bundle",
        )  # fmt: skip
    assert not (tmp_path / "bundle").exists()


Times = dict[tuple[str, int], float | RuntimeError]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Times:
    """A GPU of compute capability 9.0, and what timing a kernel at a number of keys gives."""
    times: Times = {}

    def time(config: object, shape: Attention, dtype: str, device: str, kernel: Any) -> float:
        found = times[kernel.__name__, shape.keys]
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(attention_rule, "_time", time)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return times


def test_a_kernel_that_is_asked_for_is_that_of_self_attention_and_measured_alone(
    gpu: Times,
) -> None:
    gpu |= {("cudnn", 72): 2.0, ("cudnn", 512): 1.0, ("sdpa", 512): 0.5}
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(64, 96, 9)
    chosen, seconds = choose_kernels(config, geometry, "bf16", "cuda", None, "cudnn")
    assert chosen == {"self": "cudnn", "text": "sdpa"}
    assert seconds == {"self": {"cudnn": 2.0}, "text": {"cudnn": 1.0, "sdpa": 0.5}}


def test_as_many_tokens_as_rows_of_text_are_two_kinds_all_the_same(gpu: Times) -> None:
    gpu |= {("cudnn", 512): 1.0, ("sdpa", 512): 0.5}
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(128, 128, 29)
    assert geometry.num_tokens == 512
    chosen, seconds = choose_kernels(config, geometry, "bf16", "cuda", None, "cudnn")
    assert chosen == {"self": "cudnn", "text": "sdpa"} and seconds["self"] == {"cudnn": 1.0}


def test_a_kernel_that_does_not_run_is_left_out_aloud(gpu: Times) -> None:
    gpu |= {(name, keys): 1.0 for name in ("cudnn", "sdpa") for keys in (72, 512)}
    gpu["cudnn", 72] = RuntimeError("CUDA out of memory.\nTried to")
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(64, 96, 9)
    with pytest.warns(WanExportWarning, match=r"self is chosen without cudnn, .*out of memory"):
        chosen, _ = choose_kernels(config, geometry, "bf16", "cuda", None)
    assert chosen == {"self": "sdpa", "text": "cudnn"}


def test_fp32_on_a_gpu_has_one_kernel(gpu: object) -> None:
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(64, 96, 9)
    chosen, seconds = choose_kernels(config, geometry, "fp32", "cuda", Path("library"))
    assert chosen == {"self": "sdpa", "text": "sdpa"} and not seconds


def test_kernels_that_cannot_be_had() -> None:
    with pytest.raises(BundleError, match="has no FlashAttention-4 kernel"):
        open_kernel("fa4", None)
    with pytest.raises(BadRequest, match="unknown attention kernel 'fast'"):
        open_kernel("fast", None)


def test_another_kernel_than_cudnn_must_be_clearly_faster() -> None:
    assert _best({"cudnn": 1.0, "sdpa": 0.97, "fa4": 1.2}) == "cudnn"
    assert _best({"cudnn": 1.0, "sdpa": 0.97, "fa4": 0.8}) == "fa4"
    assert _best({"sdpa": 2.0}) == "sdpa"
    with pytest.raises(EngineFailure, match="no attention kernel runs at this shape"):
        _best({})


def test_a_cpu_has_one_kernel_for_every_kind() -> None:
    config, geometry = PRESETS["flf2v-14b"].config, Geometry(64, 96, 9)
    kinds = program_of(config, geometry).attention
    assert {kind: spec.keys for kind, spec in kinds.items()} == {
        "self": 72,
        "text": 512,
        "image": 514,
    }
    chosen, seconds = choose_kernels(config, geometry, "bf16", "cpu", Path("unused"))
    assert chosen == dict.fromkeys(kinds, "sdpa") and not seconds
