"""Chrome traces are read as they are exported, and what is none is refused in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.trace.traces import raw
from wanexport.exporter.trace import lines
from wanexport.exporter.trace.chrome import (
    events_of,
    read_trace,
    refuse_empty_trace,
    write_lines,
)
from wanexport.exporter.trace.event import Called, Line, Tensor
from wanexport.exporter.trace.lines import read_back, shown, written
from wanexport.exporter.trace.steps import steps_of
from wanexport.exporter.trace.waits import Wait, waits_of
from wanexport.runtime.errors import BadRequest, WanExportError

EVENTS: list[Any] = [
    raw("kernel", "gemm", 9.5, 2, device=0, stream=7, correlation=3, **{"External id": 5}),
    raw(
        "cpu_op", "aten::addmm", 1, 4.25, **{
            "External id": 5,
            "Input type": ["float", "c10::BFloat16", "Scalar", "TensorList", ""],
            "Input Dims": [[30], [10, 20], [], [[2], [3, 4]], []],
            "Input Strides": [[1], [20, 1], [], [[1], [4, 1]], []],
            "Concrete Inputs": ["", "", "1", "", ""],
        },
    ),
    raw("cuda_runtime", "cudaLaunchKernel", 2, 1, correlation=3),
    raw("cpu_op", "onnx::Gemm", 20, 1, **{
        "Input shapes": [{"float": [2, 3]}], "Output shapes": [{"float": [2, 4]}]
    }),
    raw("gpu_user_annotation", "step", 0, 99),
    {"ph": "M", "name": "process_name"},
    {"ph": "i", "cat": "cpu_op", "name": "an instant", "ts": 1},
    {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1},
    "no event",
]  # fmt: skip


def test_events_have_what_the_trace_says_of_them() -> None:
    addmm, launch, gemm, node = events_of({"traceEvents": EVENTS})
    assert (addmm.name, addmm.start, addmm.end, addmm.operator) == ("aten::addmm", 1, 5.25, 5)
    assert addmm.given == (
        Tensor("float", (30,), (1,)), Tensor("c10::BFloat16", (10, 20), (20, 1)), None,
        Tensor("", (2,)), Tensor("", (3, 4)), None,
    )  # fmt: skip
    assert addmm.values[2] == "1"
    assert (launch.kind, launch.link, gemm.kind, gemm.link) == ("call", 3, "device", 3)
    assert (gemm.place, gemm.operator) == (("0", "7"), 5)
    assert (node.given, node.made) == ((Tensor("float", (2, 3)),), (Tensor("float", (2, 4)),))


@pytest.mark.parametrize("content", [{"traceEvents": EVENTS}, EVENTS])
@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz", "trace"])
def test_a_trace_is_a_list_or_an_object_and_may_be_gzipped(
    content: Any, name: str, tmp_path: Path
) -> None:
    text = json.dumps(content).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert len(events_of(read_trace(tmp_path / name))) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no Chrome trace"),
        (b"PK\x03\x04", "is no Chrome trace"),
        (b"\x1f\x8bnothing", "is no Chrome trace"),
        (gzip.compress(b"{}", mtime=0)[:-6], "is no Chrome trace"),
        (b"{", "is no Chrome trace"),
        (b"[" * 100_000, "is no Chrome trace"),
        (b"{}", r"is no Chrome trace \(it has no traceEvents\): expected"),
        (b"3", r"it has no traceEvents"),
        (b'{"traceEvents": {}}', "it has no traceEvents"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=message) as refused:
        read_trace(path)
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match="is no regular file"):
        read_trace(tmp_path)


@pytest.mark.parametrize("trace", [[], EVENTS[4:], [raw("user_annotation", "step", 0, 1)]])
def test_a_trace_without_operators_and_kernels_is_empty(trace: list[Any]) -> None:
    with pytest.raises(BadRequest, match=r"^x\.json is an empty trace, without operators"):
        refuse_empty_trace(events_of({"traceEvents": trace}), "x.json")


@pytest.mark.parametrize(
    "changed",
    [
        {"ts": "early"}, {"ts": None}, {"dur": []}, {"args": {"correlation": "x"}}, {"args": 3},
        {"args": {"Input type": ["float"], "Input Dims": [3]}}, {"args": {"Input type": 3}},
        {"args": {"Input shapes": [3]}}, {"ts": float("nan")}, {"dur": float("inf")},
        {"ts": 1e308, "dur": 1e308}, {"args": {"Input type": ["float"], "Input Dims": [[1, "a"]]}},
        {"args": {"Input type": ["float"], "Input Dims": [[1e308]]}},
        {"args": {"Input type": ["TensorList"], "Input Dims": [[[10**30]]]}},
    ],
)  # fmt: skip
def test_a_damaged_event_is_refused_by_its_name(changed: dict[str, Any]) -> None:
    damaged = {**raw("cpu_op", "aten::mm", 1, 2), **changed}
    with pytest.raises(BadRequest, match=r"^the trace has a damaged event 'aten::mm': expected"):
        events_of({"traceEvents": [damaged]})


def test_lines_are_kept_in_a_trace_and_read_back() -> None:
    called = Called("Tensor.item", (Line("a b.py", 3, "f"), Line("c:d.py", 4, "<lambda>")))
    assert read_back(written(called)) == called
    assert read_back(json.loads(json.dumps(written(called)))) == called
    assert read_back(None) is read_back([]) is read_back([3]) is read_back("text") is None
    trace = {"traceEvents": [raw("cpu_op", "aten::item", 1.125, 2), raw("cpu_op", "x", 9, 1)]}
    write_lines(trace, [Wait("aten::item", 1.125, 2, False, called), Wait("x", 9, 1, False)])
    (wait,) = waits_of(steps_of(events_of(trace)))
    assert wait.called == called
    assert "Python called" not in trace["traceEvents"][1]["args"]


def test_a_file_is_shown_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(str(tmp_path / "models" / "wan.py")) == "models/wan.py"
    library = "/opt/venv/lib/python3.11/site-packages/diffusers/models/wan.py"
    assert shown(library) == "diffusers/models/wan.py"
    assert shown("/elsewhere/x.py") == "/elsewhere/x.py"
    assert shown(lines.__file__) == "wanexport/exporter/trace/lines.py"
    assert shown("<string>") == "<string>"
