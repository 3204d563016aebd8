"""`profile` names the lines that wait, and its kinds are all of a step's time."""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.exporter.profile.planted import expected, plant, printing_line
from tests.exporter.trace.traces import raw
from wanexport.exporter.cli.main import cli
from wanexport.exporter.module_function import load_function
from wanexport.exporter.profile.profile import profile
from wanexport.exporter.trace.rates import Rates
from wanexport.runtime.errors import BadRequest, WanExportError

RATES = Rates(flops=1e11, bytes=1e10, dtype="fp32")
FLOPS = 1_237_581_824  # of the tiny preset at 64x96x9 in blocks: tests.exporter.bench counts them


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the planted model; the machine is not measured."""
    plant(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("wanexport.exporter.profile.rates.rates_here", lambda *_: RATES)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


def counted(result: dict[str, Any]) -> dict[tuple[Any, str], float]:
    return {(row["line"], row["cause"]): row["count"] for row in result["waits"]["lines"]}


def adds_up(result: dict[str, Any]) -> bool:
    """Whether the kinds are all of the time."""
    total = sum(row["seconds"] for row in result["kinds"])
    shares = sum(row["share"] for row in result["kinds"])
    return total == pytest.approx(result["seconds"]) and shares == pytest.approx(1)


def test_every_line_that_reads_a_value_is_named_with_its_count(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = profile("planted_model:make", steps=2)
    found = counted(result)
    printed = {key: count for key, count in found.items() if key[0] == printing_line()}
    assert {key: count for key, count in found.items() if key not in printed} == expected()
    assert result["waits"]["for_gpu"] == 0
    assert result["waits"]["reads"] == sum(found.values())
    # What printing costs is PyTorch's own: as often as its profiler counts.
    with torch.profiler.profile() as profiler:
        repr(torch.ones(1, 1))
    inner = {event.key: event.count for event in profiler.key_averages()}
    assert sum(printed.values()) == inner["aten::_local_scalar_dense"] > 0
    assert capsys.readouterr().out == ""  # so that --json is JSON


def test_a_line_says_who_called_it_and_what_it_called() -> None:
    result = profile("planted_model:make", steps=1)
    rows = {row["line"]: row for row in result["waits"]["lines"]}
    (helper,) = (row for line, row in rows.items() if line.startswith("planted_helper"))
    assert (helper["called"], helper["function"]) == ("Tensor.__float__", "read")
    (caller,) = (line for line in helper["called_from"])
    lines = (Path("planted_model.py")).read_text().splitlines()
    assert lines[int(caller.partition(":")[2]) - 1].strip().startswith("return scaled(x, read(")
    assert all(row["is_exact"] for row in rows.values())


def test_a_model_that_reads_nothing_has_no_line(place: Path) -> None:
    result = profile("planted_model:clean", steps=3, warmup=1, report=place / "out")
    assert (result["waits"]["lines"], result["steps"], result["warmup"]) == ([], 3, 1)
    assert adds_up(result)
    products = next(row for row in result["kinds"] if row["kind"] == "products")
    assert products["flops"] == 3 * 2 * 8**3
    assert products["floor_seconds"] == pytest.approx(products["flops"] / RATES.flops)
    largest = {row["name"]: row for row in result["largest"]}
    assert largest["aten::mm"]["count"] == largest["aten::gelu"]["count"] == 3
    assert largest["aten::gelu"]["bytes"] == 3 * 2 * 4 * 64
    assert largest["aten::_softmax"]["floor_seconds"] == pytest.approx(3 * 2 * 4 * 64 / RATES.bytes)
    assert [Path(file).parent for file in result["files"]] == [place / "out"] * 2


def test_digest_and_trace_are_saved_and_the_trace_gives_the_digest_again(place: Path) -> None:
    result = profile("planted_model:make", steps=2)
    digest, trace = (place / name for name in result["files"])
    assert [digest.name, trace.name] == [
        "profile-planted_model-make.json", "profile-planted_model-make.trace.json.gz",
    ]  # fmt: skip
    saved = json.loads(digest.read_text())
    assert saved["kinds"] == result["kinds"] and saved["waits"] == result["waits"]
    again = profile(trace)
    for name in ("kinds", "largest", "host", "seconds", "steps", "gpu", "rates"):
        assert again[name] == result[name], name
    seen = {key: n for key, n in counted(result).items() if key[1].startswith("aten::")}
    assert counted(again) == seen  # what only Python knows of is in no trace
    assert (again["files"], again["source"]) == ([], "a trace")
    kept = profile(trace, report=place / "kept")["files"]
    assert kept == [str(place / "kept" / "profile-profile-planted_model-make.json")]


def test_a_trace_of_another_program_has_no_floors(place: Path) -> None:
    x = torch.randn(8, 8)
    with torch.profiler.profile(with_stack=True, record_shapes=True) as profiler:
        (x @ x).sum().item()
    profiler.export_chrome_trace(str(place / "theirs.json"))
    result = profile("theirs.json")
    assert result["steps"] == 1 and adds_up(result)
    assert result["notes"] == [
        "the trace does not say how fast its machine is: there are no floors"
    ]
    assert all(row["floor_seconds"] is None for row in result["largest"])
    (row,) = result["waits"]["lines"]
    assert (row["cause"], row["is_exact"]) == ("aten::item", False)
    assert row["function"] == "test_a_trace_of_another_program_has_no_floors"


def test_steps_that_differ_get_no_lines_that_could_be_anothers() -> None:
    result = profile("planted_model:alternating", steps=3, warmup=0)
    assert Counter(row["cause"] for row in result["waits"]["lines"]) == {
        "aten::item": 1, "aten::nonzero": 1,
    }  # fmt: skip
    assert all(row["line"] is None for row in result["waits"]["lines"])
    assert len(result["waits"]["marked"]) == 2
    assert all(row["line"] for row in result["waits"]["marked"])
    assert "waited at other places" in result["notes"][0]


def test_what_another_thread_waits_for_counts_without_a_line() -> None:
    result = profile("planted_model:threaded", steps=2)
    assert counted(result) == {(None, "aten::item"): 1}
    assert result["notes"] == [] and adds_up(result)


def test_a_generator_is_run_to_its_end() -> None:
    result = profile("planted_model:yielding", steps=2)
    assert [cause for _, cause in counted(result)] == ["aten::item"]
    assert result["waits"]["reads"] == 2


def test_a_compiled_model_is_not_compiled_again_for_its_lines() -> None:
    model, args, _ = load_function("planted_model:compiled")
    model(*args)  # the first time of a process Dynamo may count a frame of its own
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["total"]
    model(*args)
    once = torch._dynamo.utils.counters["frames"]["total"] - before
    torch._dynamo.reset()
    result = profile("planted_model:compiled", steps=2)
    assert torch._dynamo.utils.counters["frames"]["total"] - before == 2 * once
    source = Path("planted_model.py").read_text().splitlines()
    (line,) = (n for n, text in enumerate(source, 1) if text.endswith("# is_nonzero"))
    assert counted(result) == {(f"planted_model.py:{line}", "aten::is_nonzero"): 1}


@pytest.mark.parametrize("arm", ["onnx", "graph", "diffusers"])
def test_arms_of_a_bundle(arm: str, tiny_bundle: Path, place: Path) -> None:
    result = profile(
        tiny_bundle, arm=arm, dtype="fp32", device="cpu", steps=1, warmup=1, report=place
    )
    assert adds_up(result)
    assert (result["waits"]["lines"], result["gpu"], result["notes"]) == ([], None, [])
    assert (result["arm"], result["size"], result["tokens"]) == (arm, "64x96x9", 72)
    assert result["engine"] == ("64x96x9/onnx-fp32" if arm == "onnx" else None)
    kinds = {row["kind"]: row for row in result["kinds"]}
    # Embeddings and head come on top of what is counted of blocks.
    flops = kinds["products"]["flops"] + kinds["attention"]["flops"]
    assert FLOPS < flops < 2.5 * FLOPS
    assert kinds["attention"]["flops"] == 4 * 4 * 256 * 72 * (72 + 512)
    prefix = "onnx::" if arm == "onnx" else "aten::"
    assert result["largest"][0]["name"].startswith(prefix)
    assert kinds["products"]["seconds"] > 0 and kinds["elementwise"]["seconds"] > 0
    source = "torch.profiler and ONNX Runtime's" if arm == "onnx" else "torch.profiler"
    assert result["source"] == source
    trace = json.loads(gzip.decompress(Path(result["files"][1]).read_bytes()))
    assert trace["wanexport"]["rates"]["flops"] == RATES.flops


def test_a_bundles_figures_lie_in_its_reports(bundle: Path, place: Path) -> None:
    command = ["profile", str(bundle), "--dtype", "fp32", "--steps", "1", "--json"]
    output = CliRunner().invoke(cli, command)
    assert output.exit_code == 0, output.output
    result = json.loads(output.stdout)
    assert result["arm"] == "onnx"
    names = {Path(file).name for file in result["files"]}
    assert names == {path.name for path in (bundle / "reports").iterdir()} == {
        "profile-64x96x9-onnx-fp32.json", "profile-64x96x9-onnx-fp32.trace.json.gz",
    }  # fmt: skip


def test_the_command_prints_kinds_waits_and_the_largest(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = CliRunner().invoke(cli, ["profile", "planted_model:make", "--steps", "1"])
    assert output.exit_code == 0, output.output
    for line, cause in expected():
        assert any(line in text and cause in text for text in output.stdout.splitlines())
    assert "outside operators" in output.stdout and "aten::addmm" in output.stdout
    assert "host waits: " in output.stdout
    assert "floors: 0.1 TFLOP/s in fp32 products, 10 GB/s in copies" in output.stdout
    assert max(map(len, output.stdout.splitlines())) < 140
    monkeypatch.setattr(
        "wanexport.exporter.profile.rates.rates_here", lambda *_: Rates(None, 1e10, None)
    )
    output = CliRunner().invoke(cli, ["profile", "planted_model:clean", "--steps", "1"])
    assert "host waits: none" in output.stdout
    assert "\nfloors: 10 GB/s in copies\n" in output.stdout
    gpu = [
        raw("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        raw("kernel", "gemm", 3, 1, correlation=1),
        raw("cuda_runtime", "cudaDeviceSynchronize", 4, 3),
        raw("kernel", "flash_fwd", 8, 1, correlation=2),
    ]
    (place / "gpu.json").write_text(json.dumps(gpu))
    output = CliRunner().invoke(cli, ["profile", "gpu.json"])
    assert "GPU: busy 33.3%, 1 launches, 1 gaps of 0.004 ms together" in output.stdout
    assert "a gap of 0.004 ms, while the host ran cudaDeviceSynchronize" in output.stdout
    assert "host waits: 1 for the GPU, 0.003 ms" in output.stdout


def test_figures_stand_when_they_cannot_be_saved(place: Path) -> None:
    (place / "file").touch()
    result = profile("planted_model:clean", steps=1, report=place / "file")
    assert result["warning"].startswith("the profile was not saved: ")
    assert result["files"] == []


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("", {}, "target is empty"),
        ("absent", {}, "there is no absent: expected a bundle's folder, MODULE:FUNCTION, or a"),
        ("absent.json", {}, "there is no file absent.json"),
        ("absent/model:make", {}, "there is no absent/model:make"),
        ("engine.pt2", {}, r"engine.pt2 is not opened, as a .pt2 file may run .*: expected a bun"),
        ("absent:make", {}, r"module absent does not import \(ModuleNotFoundError"),
        ("planted_model:nobody", {}, "module planted_model has no function nobody"),
        ("planted_model:failing", {}, "a step of planted_model:failing raised RuntimeError: mat1"),
        ("planted_model:leaving", {}, "a step of planted_model:leaving raised SystemExit: 3"),
        ("planted_model:idle", {}, "the profile of planted_model:idle is an empty trace"),
        ("planted_model:clean", {"arm": "onnx"}, "a function takes no arm: leave it out"),
        ("planted_model:clean", {"device": "cpu", "frames": 9}, "takes no device and frames"),
        ("planted_model:clean", {"steps": 0}, "0 steps and 2 of warm-up: expected 1 and 0"),
        ("empty.json", {}, "empty.json is an empty trace"),
        ("empty.json", {"steps": 3}, "a trace takes no steps: leave it out"),
        ("planted_model.py", {}, "planted_model.py is no Chrome trace"),
        ("planted", {}, "manifest"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    target: str, options: dict[str, Any], message: str, place: Path
) -> None:
    (place / "empty.json").write_text('{"traceEvents": []}')
    (place / "engine.pt2").write_bytes(b"PK")
    (place / "planted").mkdir()
    before = sorted(place.rglob("*.json*"))
    with pytest.raises(WanExportError, match=message) as refused:
        profile(target, **options)
    assert "\n" not in str(refused.value)
    assert sorted(place.rglob("*.json*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arm": "vllm"}, "unknown arm 'vllm'"),
        ({"arm": "aoti"}, "has no such engine"),
        ({"backend": "onnx"}, "profile takes no backend: name it as the arm, onnx"),
        ({"offload": "experts"}, "profile opens one expert"),
        ({"arm": "graph", "cuda_graph": True}, "no arm of graph takes cuda graph"),
        ({"resolution": "480x832"}, "has no such engine"),
        ({"weights": "style"}, "no weights set style"),
    ],
)
def test_what_a_bundle_has_not_is_refused(
    options: dict[str, Any], message: str, tiny_bundle: Path
) -> None:
    with pytest.raises(WanExportError, match=message):
        profile(tiny_bundle, **{"dtype": "fp32", **options})


def test_a_profiling_hook_of_the_user_is_there_again() -> None:
    def hook(*_: object) -> None:
        pass

    sys.setprofile(hook)
    try:
        profile("planted_model:clean", steps=1, warmup=0)
        assert sys.getprofile() is hook
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("kind", ["profiler", "autograd.profiler"])
def test_a_model_that_opens_a_profiler_is_refused(kind: str, place: Path) -> None:
    place.joinpath("planted_inner.py").write_text(
        f"import torch\nfrom torch.{kind} import profile\n"
        "def make():\n    def step(x):\n        with profile():\n            return x.exp()\n"
        "    return step, (torch.ones(2),)\n"
    )
    with pytest.raises(BadRequest, match=r"take torch\.profiler out"):
        profile("planted_inner:make", steps=1, warmup=0)
    profile("planted_model:clean", steps=1, warmup=0)  # and the next is recorded


def test_a_mistake_of_the_model_is_its_own(place: Path) -> None:
    with pytest.raises(BadRequest, match="raised RuntimeError") as refused:
        profile("planted_model:failing")
    assert isinstance(refused.value.__cause__, RuntimeError)


ON_GPU = """
import torch

def step(x, values, pinned):
    y = x @ x
    a = y.sum().item()  # 1
    b = values.to("cuda")  # 1
    c = pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()  # 1
    torch.cuda.current_stream().synchronize()  # 1
    d = y[y > 0]  # 1
    e = y.cpu()  # 1
    f = torch.tensor([1.0, 2.0], device="cuda")  # 1
    g = values.sum().item()  # read
    return y

def make():
    x = torch.randn(512, 512, device="cuda")
    return step, (x, torch.randn(100_000), torch.randn(100).pin_memory())
"""


@pytest.mark.gpu
def test_on_a_gpu_each_wait_has_its_line(place: Path) -> None:
    (place / "planted_gpu.py").write_text(ON_GPU)
    result = profile("planted_gpu:make", steps=2)
    marks = {
        f"planted_gpu.py:{n}": line.partition("# ")[2]
        for n, line in enumerate(ON_GPU.splitlines(), 1)
        if "# " in line
    }
    waits = {row["line"]: row for row in result["waits"]["lines"]}
    assert {line: row["count"] for line, row in waits.items() if row["for_gpu"]} == {
        line: 1 for line, mark in marks.items() if mark == "1"
    }
    assert [row["cause"] for row in waits.values() if not row["for_gpu"]] == ["aten::item"]
    assert result["notes"] == [] and result["gpu"]["launches"] > 3
    assert 0 < result["gpu"]["busy"] <= 1 and adds_up(result)
    products = next(row for row in result["kinds"] if row["kind"] == "products")
    assert products["flops"] == 2 * 512**3
