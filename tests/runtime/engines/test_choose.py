"""Backend, device, dtype and size never change without a word."""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from wanexport.graphs.config import PRESETS
from wanexport.runtime import WanExportError
from wanexport.runtime.bundle.manifest import EngineRecord, Manifest, SamplingDefaults, TensorSpec
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.errors import WanExportWarning
from wanexport.runtime.geometry import Geometry

BUNDLE = Path("bundle")
SHAPE = TensorSpec((1,))
ONNX = EngineRecord(
    backend="onnx",
    dtype="fp32",
    geometry=Geometry(64, 96, 9),
    inputs={"latent": SHAPE},
    output=SHAPE,
    sampling=SamplingDefaults(4, 5.0, (1.0, 1.0), None, 16),
    files={},
    weights_header_sha256="",
    key="",
    target={"device": "cpu"},
)
# Of a PyTorch that is nowhere, so that no machine runs them.
AOTI_CPU = replace(ONNX, backend="aoti", target={"device": "cpu", "torch": "0.1", "arch": "z"})
AOTI_GPU = replace(
    ONNX, backend="aoti", dtype="bf16", target={"device": "cuda", "torch": "0.1", "arch": "sm90"}
)
PLAN = replace(
    ONNX, backend="tensorrt", dtype="bf16",
    target={"device": "cuda", "arch": "sm9", "tensorrt": "0.1"},
)  # fmt: skip
BF16 = replace(ONNX, dtype="bf16")


@pytest.fixture(autouse=True)
def gpu_devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPU's device files, of which there are none until a test adds one."""
    found: list[str] = []
    monkeypatch.setattr(
        "wanexport.runtime.engines.choose.gpu_obstacle", lambda _: "no provider here"
    )
    monkeypatch.setattr("wanexport.runtime.bundle.usable.mismatch", lambda *_: "")
    monkeypatch.setattr("os.path.exists", lambda path: path in found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def choose(*engines: EngineRecord, **options: str) -> EngineRecord:
    manifest = Manifest("tiny", PRESETS["tiny"].config, (), {}, engines, wanexport="0")
    return choose_engine(BUNDLE, manifest, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("better", "reason"),
    [
        (AOTI_GPU, r"64x96x9/aoti-bf16-sm90 (is for a GPU|was compiled for)"),
        (PLAN, r"64x96x9/tensorrt-bf16-sm9 (cannot run here|was built for)"),
        (replace(AOTI_GPU, dtype="fp16"), "64x96x9/aoti-fp16-sm90"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_better_engine_that_is_refused_is_a_warning_with_its_reason(
    order: int, better: EngineRecord, reason: str
) -> None:
    with pytest.warns(WanExportWarning, match=reason) as warned:
        chosen = choose(*(better, ONNX)[::order])
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert str(warned[0].message).endswith("engine 64x96x9/onnx-fp32 runs on cpu instead")
    assert chosen.backend == "onnx" and warned[0].filename == __file__


@pytest.mark.parametrize(
    "options", [{"device": "cpu"}, {"backend": "onnx"}, {"dtype": "fp32"}, {"provider": "cpu"}]
)
def test_who_asks_for_what_runs_is_not_warned(options: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(AOTI_GPU, PLAN, ONNX, **options).backend == "onnx"


def test_a_worse_engine_that_is_refused_is_no_matter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(ONNX, AOTI_CPU, BF16) == ONNX


def test_an_onnx_engine_on_a_cpu_is_told_of_only_where_there_is_a_gpu(
    gpu_devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(BF16, ONNX) == ONNX
        gpu_devices.append("/dev/nvidiactl")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose(BF16, ONNX) == ONNX
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert choose(ONNX, device="cpu") == ONNX
    with pytest.warns(WanExportWarning, match=r"onnx-fp32 cannot run on a GPU: no provider here"):
        assert choose(BF16, ONNX) == ONNX


def test_a_plan_for_another_gpu_beside_its_own_is_no_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = replace(PLAN, target={**PLAN.target, "arch": "sm8"})
    monkeypatch.setattr(
        "wanexport.runtime.engines.choose._refusal",
        lambda _, engine, __: "" if engine == other else "not for this GPU",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(PLAN, other) == other


@pytest.mark.parametrize("order", [1, -1])
def test_a_refused_engine_of_another_shape_needs_a_choice_too(order: int) -> None:
    larger = replace(AOTI_GPU, geometry=Geometry(480, 832, 81))
    with pytest.raises(WanExportError, match=r"several shapes .*480x832x81/aoti.*: name resolu"):
        choose(*(larger, ONNX)[::order])
    assert choose(larger, ONNX, resolution="64x96") == ONNX
    assert choose(larger, ONNX, device="cpu") == ONNX


def test_when_none_runs_every_refusal_is_told() -> None:
    with pytest.raises(WanExportError) as caught:
        choose(AOTI_GPU, PLAN, AOTI_CPU, BF16)
    message = str(caught.value)
    for name in ("aoti-bf16-sm90", "tensorrt-bf16-sm9", "aoti-fp32-z", "onnx-bf16 is bf16, which"):
        assert f"engine 64x96x9/{name} " in message
    assert message.count("onnx-bf16 cannot run on a GPU: no provider") == 1
    assert "\n" not in message


def test_an_engine_of_a_newer_dtype_is_refused_by_name() -> None:
    newer = [replace(engine, dtype="fp8") for engine in (ONNX, AOTI_CPU, AOTI_GPU, PLAN)]
    assert choose(*newer, ONNX) == ONNX
    with pytest.raises(
        WanExportError, match="aoti-fp8-z has dtype fp8, which this wanexport does not"
    ):
        choose(*newer)


def test_a_pytorch_that_does_not_import_is_a_reason_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "torch":
                raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(WanExportError, match=r"does not import .libcudart\.so\.13"):
        choose(AOTI_CPU)
