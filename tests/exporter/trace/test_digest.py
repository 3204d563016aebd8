"""The digest of small traces whose answers are counted by hand."""

from typing import Any

import pytest

from tests.exporter.trace.traces import call, floats, item, kernel, op, step, steps
from wanexport.exporter.trace.digest import digest, with_known_flops
from wanexport.exporter.trace.rates import Rates, rates_from
from wanexport.exporter.trace.steps import Steps
from wanexport.exporter.trace.waits import waits_of

RATES = Rates(flops=1e9, bytes=1e9, dtype="bf16")  # 1000 FLOPs, or bytes, a microsecond
PRODUCT = {"given": (floats(10, 20), floats(20, 30))}  # 12000 FLOPs, 12 us


def on_gpu() -> Steps:
    """Two steps. Kernels run from 20 to 150, of which nothing does from 70 to 90 and 95 to 100."""
    return steps(
        step(0, 50),
        op("aten::mm", 1, 10, number=11, **PRODUCT),
        call("cudaLaunchKernel", 2, 4, 1),
        call("cuLaunchKernel", 5, 6, 2),
        kernel("gemm", 20, 50, 1, number=11),
        kernel("splitKreduce_kernel", 50, 60, 2, number=11),
        op("aten::gelu", 10, 20, number=12, given=(floats(1000),)),
        call("cudaLaunchKernel", 11, 13, 3),
        kernel("vectorized_elementwise_kernel<4, Gelu>", 40, 70, 3, stream=9, number=12),
        step(50, 130),
        op("my::rotary", 52, 60, number=13),
        call("cudaLaunchKernel", 53, 55, 4),
        kernel("triton_poi_fused_mul_0", 90, 95, 4, number=13),
        op("aten::item", 60, 99, number=14),
        op("aten::_local_scalar_dense", 61, 98, number=15),
        call("cudaMemcpyAsync", 62, 64, 5),
        call("cudaStreamSynchronize", 65, 97, None),
        kernel("ncclDevKernel_AllReduce_Sum_bf16", 100, 140, 6),
        call("cudaLaunchKernelExC", 99, 100, 6),
        kernel("Memcpy DtoH (Device -> Pageable)", 145, 150, 5, number=15),
        kernel("Memset (Device)", 140, 145, 7),
        call("cudaMemsetAsync", 100, 101, 7),
    )


def test_kinds_and_the_largest_of_a_gpu() -> None:
    found = on_gpu()
    result = digest(found, waits_of(found), RATES)
    kinds = {row["kind"]: row for row in result["kinds"]}
    taken = {kind: row["seconds"] * 1e6 for kind, row in kinds.items()}
    assert taken == pytest.approx(
        {"products": 20, "attention": 0, "elementwise": 17.5, "copies": 5, "collectives": 20}
    )
    assert sum(taken.values()) == pytest.approx(result["seconds"] * 1e6)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    assert kinds["products"]["flops"] == 12_000 / 2  # once, though two kernels share them
    assert kinds["products"]["floor_seconds"] == pytest.approx(6e-6)
    assert kinds["elementwise"]["floor_seconds"] is None  # since the bytes of one are unknown
    largest = {row["name"]: row for row in result["largest"]}
    names = ["ncclDevKernel_AllReduce_Sum_bf16", "gemm", "vectorized_elementwise_kernel<4, Gelu>"]
    assert list(largest)[:1] == names[:1] and set(list(largest)[:3]) == set(names)
    gelu = largest["vectorized_elementwise_kernel<4, Gelu>"]
    assert (gelu["bytes"], gelu["count"]) == (8000 / 2, 0.5)
    assert gelu["floor_seconds"] == pytest.approx(4e-6)
    assert largest["gemm"]["floor_seconds"] == pytest.approx(6e-6)
    assert largest["splitKreduce_kernel"]["floor_seconds"] == 0
    assert largest["triton_poi_fused_mul_0"]["floor_seconds"] is None


def test_gaps_launches_and_the_host_of_a_gpu() -> None:
    found = on_gpu()
    result = digest(found, waits_of(found), None)
    gpu, host = result["gpu"], result["host"]
    assert gpu["busy"] == pytest.approx(1 - 25 / 130)
    assert (gpu["streams"], gpu["launches"], gpu["gaps"]) == (2, 7 / 2, 2 / 2)
    assert gpu["gap_seconds"] == pytest.approx(12.5e-6)
    assert [(round(gap["seconds"] * 1e6), gap["host"]) for gap in gpu["largest_gaps"]] == [
        (20, "cudaStreamSynchronize"), (5, "aten::item"),
    ]  # fmt: skip
    assert result["seconds_per_step"] == pytest.approx(75e-6)
    assert result["host_seconds_per_step"] == pytest.approx(65e-6)
    calls = (2 + 1 + 2 + 2 + 2 + 32 + 1 + 1) / 2
    assert host["call_seconds"] == pytest.approx(calls * 1e-6)
    assert host["operator_seconds"] == pytest.approx((9 + 10 + 8 + 39 - 3 - 2 - 2 - 34) / 2 * 1e-6)
    assert host["outside_seconds"] == pytest.approx((130 - 9 - 10 - 8 - 39) / 2 * 1e-6)
    assert all(row["floor_seconds"] is None for row in result["kinds"])
    waits = result["waits"]
    assert (waits["for_gpu"], waits["reads"]) == (0.5, 0)
    assert waits["seconds"] == pytest.approx(34e-6 / 2)
    assert [(row["cause"], row["line"]) for row in waits["lines"]] == [("aten::item", None)]


def test_a_gap_in_which_the_host_runs_no_operator_is_pythons() -> None:
    found = steps(
        step(0, 50),
        call("cudaLaunchKernel", 1, 2, 1),
        kernel("a", 3, 4, 1),
        op("aten::view", 5, 6),
        call("cudaLaunchKernel", 20, 21, 2),
        kernel("b", 22, 23, 2),
    )
    (gap,) = digest(found, [], None)["gpu"]["largest_gaps"]
    assert gap["host"] == "Python, in no operator"


def test_on_a_cpu_kinds_and_what_is_outside_operators_are_the_step() -> None:
    found = steps(
        step(0, 100),
        op("aten::linear", 0, 40, given=(floats(10, 20), floats(30, 20))),
        op("aten::t", 1, 3),
        op("aten::addmm", 5, 35, given=(floats(30), floats(10, 20), floats(20, 30))),
        op("aten::gelu", 50, 60, given=(floats(1000),)),
    )
    result = digest(found, [], RATES)
    taken = {row["kind"]: round(row["seconds"] * 1e6, 6) for row in result["kinds"]}
    assert taken == {
        "products": 38, "attention": 0, "elementwise": 10, "copies": 0, "collectives": 0,
        "other": 2, "outside operators": 50,
    }  # fmt: skip
    assert result["seconds"] == result["seconds_per_step"] == pytest.approx(100e-6)
    assert result["gpu"] is None
    largest = {row["name"]: row for row in result["largest"]}
    assert (largest["aten::addmm"]["flops"], largest["aten::linear"]["flops"]) == (12_000, 0)


def test_only_the_largest_twenty_are_listed() -> None:
    events = [op(f"my::{i}", 100 * i, 101 * i + 1) for i in range(30)]
    result = digest(steps(step(0, 4000), *events), [], None)
    assert [row["name"] for row in result["largest"]] == [f"my::{i}" for i in range(29, 9, -1)]


def test_waits_of_a_line_are_one_row_and_those_for_the_gpu_come_first() -> None:
    reads = [op("aten::equal", 60 + 10 * i, 69 + 10 * i) for i in range(3)]
    found = steps(step(0, 100), *reads, *item(10, 1), *item(30, 2))
    rows = digest(found, waits_of(found), None)["waits"]["lines"]
    assert [(row["cause"], row["count"], row["for_gpu"]) for row in rows] == [
        ("aten::item", 2, True), ("aten::equal", 3, False),
    ]  # fmt: skip


def test_flops_that_follow_from_the_model_fill_what_no_shapes_told() -> None:
    found = steps(step(0, 9), call("cudaLaunchKernel", 1, 2, 1), kernel("gemm", 3, 9, 1))
    kinds = digest(found, [], RATES)["kinds"]
    with_known_flops(kinds, {"products": 3000, "attention": 9}, RATES)
    rows = {row["kind"]: (row["flops"], row["floor_seconds"]) for row in kinds}
    assert rows["products"] == (3000, pytest.approx(3e-6))
    assert rows["attention"] == (None, None)  # which did not run


def test_rates_are_read_back_or_not_at_all() -> None:
    assert rates_from({"flops": 2.0, "bytes": 3, "dtype": "fp32"}) == Rates(2.0, 3, "fp32")
    assert rates_from({"flops": None, "bytes": 3, "dtype": None}) == Rates(None, 3, None)
    others: list[Any] = [None, [], {}, {"flops": "2", "bytes": 3}, {"flops": 2, "bytes": 0}]
    others += [{"flops": 1e-320, "bytes": 3}]  # floors of it would be infinite
    assert not any(map(rates_from, others))
    assert Rates(None, 4, None).floor(8, None) is None
    assert Rates(2, 4, "fp32").floor(None, 8) == 2
    assert Rates(2, 4, "fp32").floor(None, None) is None


def test_bytes_of_an_operator_are_not_guessed_for_each_of_its_kernels() -> None:
    found = steps(
        step(0, 50),
        op("aten::gelu", 1, 9, number=1, given=(floats(1000),)),
        call("cudaLaunchKernel", 2, 3, 1),
        call("cudaLaunchKernel", 4, 5, 2),
        kernel("elementwise_kernel<a>", 10, 11, 1, number=1),
        kernel("elementwise_kernel<b>", 12, 13, 2, number=1),
        op("aten::copy_", 20, 29, number=2, given=(floats(1000), floats(1000))),
        call("cudaMemcpyAsync", 21, 22, 3),
        kernel("Memcpy HtoD (Pinned -> Device)", 23, 30, 3, number=2),
        op("aten::copy_", 30, 39, number=3, given=(floats(1000), floats(1000))),
        call("cudaMemcpyAsync", 31, 32, 4),
        kernel("Memcpy DtoD (Device -> Device)", 33, 40, 4, number=3),
    )
    rows = {row["name"]: row for row in digest(found, [], RATES)["largest"]}
    assert {name: row["bytes"] for name, row in rows.items()} == {
        "elementwise_kernel<a>": None,
        "elementwise_kernel<b>": None,
        "Memcpy HtoD (Pinned -> Device)": None,  # not as fast as memory, by far
        "Memcpy DtoD (Device -> Device)": 8000,
    }
