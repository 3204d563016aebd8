"""Backend, device, dtype and size never change without a word."""

import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.runtime.bundle.small_bundle import CONFIG, GEOMETRY
from wanexport.runtime.bundle.details import AotiDetails, OnnxDetails, TensorRtDetails
from wanexport.runtime.bundle.manifest import DENOISER, EngineRecord, FileRecord, Manifest
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.engines.choose import Choice, choose_engine
from wanexport.runtime.engines.device_name import check_device, device_kind
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.onnx import refusal as onnx_refusal
from wanexport.runtime.engines.table import BACKENDS, ENGINES
from wanexport.runtime.errors import BadRequest, BundleError, WanExportWarning
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.geometry import Geometry

BUNDLE = Path("bundle")
FILE = FileRecord("engines/x", 0, "")
ONNX = EngineRecord(
    backend="onnx",
    role=DENOISER,
    family="t2v",
    dtype="fp32",
    geometry=GEOMETRY,
    program=program_of(CONFIG, GEOMETRY).whole(),
    details=OnnxDetails(),
    sampling=SamplingDefaults(4, 5.0, (1.0, 1.0), None, 16),
    files={"denoiser": FILE},
    layout="",
    key="",
    target={"device": "cpu"},
)
_AOTI = replace(
    ONNX, backend="aoti", details=AotiDetails(), program=program_of(CONFIG, GEOMETRY),
    files=dict.fromkeys(("embed", "block", "head"), FILE),
)  # fmt: skip
# Of a PyTorch that is nowhere, so that no machine runs them.
AOTI_CPU = replace(_AOTI, target={"device": "cpu", "torch": "0.1", "arch": "z"})
AOTI_GPU = replace(_AOTI, dtype="bf16", target={"device": "cuda", "torch": "0.1", "arch": "sm90"})
PLAN = replace(
    ONNX, backend="tensorrt", dtype="bf16", details=TensorRtDetails(),
    target={"device": "cuda", "arch": "sm9", "tensorrt": "0.1"},
)  # fmt: skip
BF16 = replace(ONNX, dtype="bf16")


@pytest.fixture(autouse=True)
def gpu_devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPU's device files, of which there are none until a test adds one."""
    found: list[str] = []
    monkeypatch.setattr("wanexport.runtime.engines.onnx.gpu_obstacle", lambda _: "no provider here")
    monkeypatch.setattr("wanexport.runtime.bundle.usable.mismatch", lambda *_: "")
    monkeypatch.setattr("wanexport.runtime.bundle.usable._lacks", lambda *_: "")
    monkeypatch.setattr("os.path.exists", lambda path: path in found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def manifest_of(*engines: EngineRecord) -> Manifest:
    config = replace(CONFIG, family=engines[0].family)
    return Manifest("small", config, (), {}, engines, wanexport="0")


def choose(*engines: EngineRecord, **options: object) -> EngineRecord:
    asked = EngineOptions(**options)  # type: ignore[arg-type]
    return choose_engine(BUNDLE, manifest_of(*engines), asked).record


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
        lambda _, choice, __: "" if choice.record == other else "not for this GPU",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(PLAN, other) == other


@pytest.mark.parametrize("order", [1, -1])
def test_a_refused_engine_of_another_shape_needs_a_choice_too(order: int) -> None:
    larger = replace(AOTI_GPU, geometry=Geometry(480, 832, 81))
    with pytest.raises(BadRequest, match=r"several shapes .*480x832x81/aoti.*: name resolu"):
        choose(*(larger, ONNX)[::order])
    assert choose(larger, ONNX, resolution="64x96") == ONNX
    assert choose(larger, ONNX, device="cpu") == ONNX


def causal(chunk: int, cache: int, frames: int = 81) -> EngineRecord:
    """An engine of a causal model."""
    geometry = Geometry(480, 832, frames, chunk=chunk, cache=cache)
    return replace(ONNX, family="self-forcing", geometry=geometry)


@pytest.mark.parametrize(
    ("engines", "asks"),
    [
        ([(3, 7), (3, 21)], "name cache"),
        ([(1, 21), (3, 21)], "name chunk"),
        ([(1, 7), (3, 21)], "name chunk and cache"),
        ([(3, 21, 33), (3, 21)], "name frames"),
        ([(3, 7, 33), (3, 21), (1, 21)], "name frames and chunk and cache"),
    ],
)
def test_of_causal_engines_it_asks_for_that_by_which_they_differ(
    engines: list[tuple[int, ...]], asks: str
) -> None:
    with pytest.raises(BadRequest, match=rf"several shapes \(480x832x.*chunk.*\): {asks}$"):
        choose(*(causal(*engine) for engine in engines))


@pytest.mark.parametrize("order", [1, -1])
def test_a_causal_engine_is_chosen_by_its_chunk_and_its_cache(order: int) -> None:
    small, wide, single = engines = causal(3, 7), causal(3, 21), causal(1, 21)
    held = engines[::order]
    assert choose(*held, chunk=1) == single
    assert choose(*held, cache=7) == small
    assert choose(*held, chunk=3, cache=21) == wide
    with pytest.raises(BadRequest, match=r": name chunk$"):
        choose(*held, cache=21)
    with pytest.raises(BadRequest) as refused:
        choose(*held, chunk=1, cache=7)
    message = str(refused.value)
    assert "no such engine; it holds " in message and "\n" not in message
    assert all(engine.name in message for engine in engines)
    assert small.name == "480x832x81-chunk3-cache7/onnx-fp32"


@pytest.mark.parametrize("order", [1, -1])
def test_of_one_chunk_and_cache_the_backend_decides_as_ever(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanexport.runtime.engines.choose._refusal", lambda *_: "")
    compiled = replace(AOTI_CPU, family="self-forcing", geometry=causal(3, 7).geometry)
    held = (compiled, causal(3, 21), causal(3, 7))[::order]
    assert choose(*held, cache=7, device="cpu") == causal(3, 7)
    assert choose(*held, cache=7, device="cpu", backend="aoti") == compiled


@pytest.mark.parametrize("options", [{"chunk": 3}, {"cache": 21}, {"chunk": 3, "cache": 21}])
def test_an_engine_of_whole_videos_has_no_chunk_and_no_cache(options: dict[str, int]) -> None:
    said = f"^{' and '.join(options)}: only engines of a causal model have this, and .*t2v: leave"
    with pytest.raises(BadRequest, match=said):
        choose(ONNX, **options)


@pytest.mark.parametrize("value", [0, -1, True, 3.0, "3", float("nan")])
@pytest.mark.parametrize("name", ["chunk", "cache"])
def test_a_chunk_that_is_no_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(BadRequest, match=rf"^{name} .*: expected latent frames, a number from 1"):
        choose(causal(3, 21), **{name: value})


def test_when_none_runs_every_refusal_is_told() -> None:
    with pytest.raises(BundleError) as caught:
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
        BundleError, match="aoti-fp8-z has dtype fp8, which this wanexport does not"
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
    with pytest.raises(BundleError, match=r"does not import .libcudart\.so\.13"):
        choose(AOTI_CPU)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that executes every engine, on any of its GPUs."""
    monkeypatch.setattr("wanexport.runtime.engines.choose._refusal", lambda *_: "")


@pytest.mark.parametrize(
    ("asked", "record", "device"),
    [
        (None, "aoti", "cuda"),
        ("cuda", "aoti", "cuda"),
        ("cuda:0", "aoti", "cuda:0"),
        ("cuda:1", "aoti", "cuda:1"),
        ("cuda:12", "aoti", "cuda:12"),
        ("cpu", "onnx", "cpu"),
    ],
)
def test_a_gpu_may_be_named_by_its_number(
    asked: str | None, record: str, device: str, everywhere: None
) -> None:
    chosen = choose_engine(BUNDLE, manifest_of(ONNX, AOTI_GPU), EngineOptions(device=asked))
    assert (chosen.record.backend, chosen.device) == (record, device)
    assert "cuda:1" not in chosen.record.target.values()  # which say the kind alone


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_runs_on_the_gpu_that_is_named(provider: str, everywhere: None) -> None:
    for asked, device in ((None, "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
        options = EngineOptions(provider=provider, device=asked)
        assert choose_engine(BUNDLE, manifest_of(AOTI_GPU, ONNX), options) == Choice(ONNX, device)
    for device in ("cuda:1", "cuda"):
        with pytest.raises(BadRequest, match=f"provider cpu is of cpu, not of {device}"):
            choose_engine(BUNDLE, manifest_of(ONNX), EngineOptions(provider="cpu", device=device))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1000", "CPU", ""])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(BadRequest, match=r"unknown device .*: expected one of cpu, cuda, cuda:N"):
        choose(ONNX, device=device)
    with pytest.raises(BadRequest, match="unknown device"):
        check_device(device)


def test_the_kind_of_a_device_has_no_number() -> None:
    assert [device_kind(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda"]
    assert [check_device(name) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]


def test_the_fastest_comes_first_on_a_gpu_and_the_exact_one_on_a_cpu(everywhere: None) -> None:
    on_gpu = [AOTI_GPU, PLAN, replace(PLAN, backend="tensorrt-rtx"), BF16, ONNX]
    on_cpu = [ONNX, replace(ONNX, dtype="fp16"), AOTI_CPU, replace(AOTI_CPU, dtype="bf16")]
    for device, best_first in (("cuda", on_gpu), ("cpu", on_cpu)):
        for first in range(len(best_first)):
            rest = best_first[first:]
            assert choose(*rest, device=device) == choose(*rest[::-1], device=device) == rest[0]


def test_every_backend_has_a_module_of_one_shape() -> None:
    assert set(BACKENDS) == ENGINES.keys()
    for name, kind in ENGINES.items():
        module = kind.backend()
        assert module.OPTIONS <= {field.name for field in fields(EngineOptions)}, name
        assert all(callable(getattr(module, f)) for f in ("refusal", "open_engines")), name
        assert kind.preferred and all(device in ("cpu", "cuda") for device, _ in kind.preferred)


def test_an_onnx_engine_that_a_cpu_cannot_execute_says_what_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = onnx_refusal(BF16, "cpu", EngineOptions(), "")
    assert "is bf16, which ONNX Runtime cannot execute on a CPU: add an engine" in reason
    assert "engine 64x96x9/onnx-fp32 cannot run on a GPU: no provider here" in onnx_refusal(
        ONNX, "cuda:1", EngineOptions(), ""
    )
    assert onnx_refusal(ONNX, "cpu", EngineOptions(), "") == ""
