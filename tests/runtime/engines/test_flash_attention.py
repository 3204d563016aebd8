"""FlashAttention-4 in a bundle: every refusal, and the library against plain maths on a GPU."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wanexport.exporter.backends.aoti import backend as aoti_backend
from wanexport.exporter.backends.aoti import flash_attention
from wanexport.exporter.backends.aoti.compile import Regions
from wanexport.exporter.backends.aoti.compiler import compiler
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.build import compile_engine
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime import Geometry
from wanexport.runtime.engines.flash_attention import Division, FlashAttention, division
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    WanExportError,
    WanExportWarning,
)

ABSENT = ("cutlass", "flash_attn", "quack", "triton")

# A serving process: argv is the library, the dtype and the number of keys.
SERVE = """
import json, sys
from pathlib import Path
import torch
from wanexport.runtime.engines.flash_attention import Division, FlashAttention, division

library, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
queries, keys, heads = map(int, sys.argv[3:])
attention = FlashAttention(library)
torch.manual_seed(0)
def draw(tokens):
    return torch.randn(1, tokens, heads, 128, device="cuda", dtype=dtype)
q, k, v = draw(queries), draw(keys), draw(keys)
def plain(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(2, 3) / 128**0.5, dim=-1)
    return (weights @ v).transpose(1, 2)
def error(out):
    exact = plain(q, k, v)
    return ((out - exact).norm() / exact.norm()).item()
def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
out = attention(q, k, v)
figures = {"eager": error(out), "sdpa": error(sdpa(q, k, v)), "contiguous": out.is_contiguous()}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = attention(q, k, v)
for x in (q, k, v):
    x.normal_()
captured.zero_()
graph.replay()
figures["graph"] = error(captured)
figures["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(figures))
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a Hopper GPU and all packages, as far as the checks before compiling go."""
    monkeypatch.setattr(flash_attention, "PACKAGES", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return monkeypatch


def test_a_missing_package_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attention, "PACKAGES", ("no-such-package",))
    with pytest.raises(WanExportError, match=r"no-such-package.*: pip install flash-attn-4$"):
        flash_attention.flash_attention_versions()
    with pytest.raises(WanExportError, match="pip install flash-attn-4"):
        flash_attention.compile_flash_attention(tmp_path, dtype="bf16", head_dim=128)


def test_fp32_is_refused(tmp_path: Path, installed: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match="bf16 or fp16, not fp32"):
        flash_attention.compile_flash_attention(tmp_path, dtype="fp32", head_dim=128)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_a_gpu_that_is_not_hopper_is_refused(
    tmp_path: Path, installed: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    installed.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(WanExportError, match=rf"Hopper.*sm{capability[0]}{capability[1]}: use"):
        flash_attention.compile_flash_attention(tmp_path, dtype="bf16", head_dim=128)


def test_a_machine_without_gpu_is_refused(tmp_path: Path, installed: pytest.MonkeyPatch) -> None:
    installed.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WanExportError, match="GPU: it has none"):
        flash_attention.compile_flash_attention(tmp_path, dtype="bf16", head_dim=128)


def test_a_kernel_that_does_not_compile_says_why_in_one_line(
    tmp_path: Path, installed: pytest.MonkeyPatch
) -> None:
    for module, code in {
        "cutlass/cute.py": "compile = None",
        "flash_attn/cute/interface.py": "raise RuntimeError('\\x1b[91mtwo\\x1b[0m\\n  lines')",
    }.items():
        path = tmp_path / "packages" / module
        path.parent.mkdir(parents=True)
        for package in list(path.relative_to(tmp_path).parents)[:-2]:
            (tmp_path / package / "__init__.py").touch()
        path.write_text(code)
    paths = [str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]
    installed.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    with pytest.raises(WanExportError, match=r"does not compile: RuntimeError: two lines$"):
        flash_attention.compile_flash_attention(tmp_path, dtype="bf16", head_dim=128)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_an_engine_whose_kernel_did_not_compile_is_no_later_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise WanExportError("does not compile")

    doubles: dict[str, Any] = {
        "flash_attention_versions": lambda: {"flash-attn-4": "4.0"},
        "compile_flash_attention": fail,
        "to_aoti.compile_regions": lambda *_: Regions({}, {}, {}),
        "attention_rule.choose_kernels": lambda *_: ({}, {}),
    }
    for name, double in doubles.items():
        monkeypatch.setattr(f"wanexport.exporter.backends.aoti.backend.{name}", double)
    config, geometry = PRESETS["tiny"].config, Geometry(64, 96, 9)
    sampling = sampling_defaults(config, (), geometry)
    target = {"device": "cuda", "arch": "sm90"}
    request = Request(config, geometry, sampling, "aoti", "bf16", "cuda", target)
    with pytest.warns(WanExportWarning, match="attention will run on cuDNN: does not compile"):
        compiled = aoti_backend.compile_engine(tmp_path, request, {}, lambda *_: None)
    assert not compiled.is_whole
    monkeypatch.setattr(aoti_backend, "compile_engine", lambda *_: compiled)
    monkeypatch.setattr("wanexport.exporter.build.engine_key", lambda request: "f" * 64)
    writer: Any = SimpleNamespace(
        free_folder=lambda _: tmp_path, manifest=SimpleNamespace(weights_of=lambda *_, **__: ())
    )
    assert compile_engine(writer, request, lambda *_: None).key != "f" * 64
    whole = replace(compiled, is_whole=True)
    monkeypatch.setattr(aoti_backend, "compile_engine", lambda *_: whole)
    assert compile_engine(writer, request, lambda *_: None).key == "f" * 64


def test_the_cause_of_a_failed_link_is_said(tmp_path: Path, installed: pytest.MonkeyPatch) -> None:
    def compile_nothing(kernel: Path, *_: object) -> dict[str, str]:
        kernel.write_text("no object file")
        return dict.fromkeys(("runtime", "tvm_ffi", "cudart"), "/no/such/library.so")

    installed.setattr(flash_attention, "_compile_in_child", compile_nothing)
    with pytest.raises(WanExportError, match="cannot be linked"):
        flash_attention.compile_flash_attention(tmp_path, dtype="bf16", head_dim=128)
    installed.setenv("CXX", "no-such-compiler")
    with pytest.raises(WanExportError, match=r"install g\+\+, or set CXX"):
        flash_attention.compile_flash_attention(tmp_path, dtype="bf16", head_dim=128)


def test_serving_without_tvm_ffi_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(BundleError, match=r"pip install apache-tvm-ffi$"):
        FlashAttention(tmp_path / "flash_attention.so")


def test_a_damaged_library_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")
    library = tmp_path / "flash_attention.so"
    library.write_bytes(b"\x7fELF and nothing else")
    with pytest.raises(BundleError, match="cannot be loaded: build the bundle again") as raised:
        FlashAttention(library)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("queries", "heads", "keys", "expected"),
    [
        (4680, 12, 32760, Division(4224, 5)),  # 33 tiles of 12 heads are 3 times 132 blocks
        (4680, 40, 32760, Division(4608, 3)),
        (4680, 12, 512, Division(4680, 1)),  # the text: a block is too short to divide
        (4680, 12, 32761, Division(4680, 1)),  # a prime number of keys
        (4224, 12, 32760, Division(4224, 1)),  # nothing is left over
        (128, 1, 32760, Division(0, 8)),  # one block
    ],
)
def test_what_leaves_processors_idle_is_divided(
    queries: int, heads: int, keys: int, expected: Division
) -> None:
    assert division(queries, heads, keys, processors=132) == expected


def of_a_double(function: Callable[..., None], *, gives_sums: bool = True) -> FlashAttention:
    """The caller of a library that has this function."""
    attention = FlashAttention.__new__(FlashAttention)
    attention._function, attention._gives_sums = function, gives_sums
    return attention


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """The scores in fp64."""
    return torch.einsum("bshd,bthd->bhst", q.double(), k.double()) / q.shape[-1] ** 0.5


@pytest.mark.parametrize("divided", [Division(0, 2), Division(3, 4), Division(7, 1)])
def test_a_divided_call_gives_what_a_whole_one_gives(
    divided: Division, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        calls.append((*q.shape[:2], k.shape[1]))
        scores = weights_of(q, k)
        lse.copy_(scores.logsumexp(-1))
        out.copy_(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.double()))

    path = "wanexport.runtime.engines.flash_attention._division_of"
    monkeypatch.setattr(path, lambda *_: divided)
    torch.manual_seed(0)
    q = torch.randn(1, 7, 3, 16)
    k, v = (5 * torch.randn(1, 12, 3, 16) for _ in range(2))  # parts of very unlike weight
    found = of_a_double(run)(q, k, v)
    expected = torch.einsum("bhst,bthd->bshd", weights_of(q, k).softmax(-1), v.double())
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    parts = (divided.parts, 7 - divided.whole, 12 // divided.parts)
    assert calls == [(1, divided.whole, 12)] * (divided.whole > 0) + [parts] * (divided.parts > 1)


def test_a_library_without_sums_is_called_whole() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        out.copy_(q + k + v)

    q, k, v = torch.randn(3, 1, 7, 3, 16)
    assert torch.equal(of_a_double(run, gives_sums=False)(q, k, v), q + k + v)


@pytest.mark.parametrize(("name", "count"), [("flash_attention", 4), ("flash_attention_lse", 5)])
def test_a_library_is_called_with_what_its_function_takes(
    name: str, count: int, tmp_path: Path
) -> None:
    """Libraries of earlier builds have a function without a place for the sums."""
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")
    source, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text(
        f'extern "C" {{ int seen = 0; int __tvm_ffi_{name}(void *, const void *, int count, void *)'
        f"{{ seen = count; return 0; }} }}"
    )
    subprocess.run([compiler(), "-shared", "-fPIC", "-o", library, source], check=True)
    q, k, v = torch.zeros(3, 2, 7, 3, 16)  # two videos, which are never divided
    assert FlashAttention(library)(q, k, v).shape == q.shape
    assert ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "seen").value == count


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "torch_dtype"), flash_attention.DTYPES.items())
def test_a_fresh_process_runs_the_library_as_accurately_as_sdpa(
    tmp_path: Path, dtype: str, torch_dtype: str
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    try:
        flash_attention.flash_attention_versions()
    except WanExportError as error:
        pytest.skip(str(error))
    library = flash_attention.compile_flash_attention(tmp_path, dtype=dtype, head_dim=128)
    assert [path.name for path in tmp_path.iterdir()] == [library.name]
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    assert division(4680, 12, 4680, processors).parts > 1  # of the last case
    for sizes in ((1000, 1000, 3), (1000, 512, 3), (4680, 4680, 12)):
        command = [sys.executable, "-c", SERVE, str(library), torch_dtype, *map(str, sizes)]
        environment = os.environ | {"PATH": "/nonexistent", "CXX": "/nonexistent"}
        child = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert child.returncode == 0, child.stderr
        figures = json.loads(child.stdout)
        assert figures["contiguous"]
        assert figures["eager"] <= 1.5 * figures["sdpa"]
        assert figures["graph"] <= 1.5 * figures["sdpa"]
        assert not set(figures["modules"]) & set(ABSENT)
