"""What `compare` and `bench` keep of a result, and where they must not write."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporter.bundle.disk_faults import full_after
from tests.exporter.bundle.stub_build import files_of, stub_build
from wanexport.exporter.bench import report as bench_report
from wanexport.exporter.bundle.lock import bundle_lock
from wanexport.exporter.compare import report as compare_report
from wanexport.exporter.compare.recorded import Loop
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportWarning

ROW = {"error": 1e-6, "floor": 0.0, "gate": 1e-5, "drift": 0.0, "passed": True}
RESULT: dict[str, Any] = {
    "steps": [ROW],
    "weights": None,
    "reference": "graph",
    "model": None,
    "inputs": "seed 0",
}
LOOP = Loop({"noise": np.zeros((1, 16), np.float32)}, 4)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    stub_build(tmp_path / "bundle")
    return tmp_path / "bundle"


def keep(bundle: Path, report: Path | None = None) -> str | None:
    outcome = compare_report.Outcome(read_manifest(bundle).engines[0], LOOP, RESULT)
    return compare_report.keep(bundle, outcome, report)


def is_noted(bundle: Path) -> bool:
    return bool(read_manifest(bundle).engines[0].parity.get("passed"))


def hold(bundle: Path, held: Any) -> None:
    with bundle_lock(bundle):
        held.set()
        signal.pause()


def test_a_comparison_that_ends_during_a_build_waits_for_it(bundle: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    builder = context.Process(target=hold, args=(bundle, held))
    builder.start()
    assert held.wait(10)
    threading.Timer(0.3, builder.kill).start()
    with pytest.warns(WanExportWarning, match="another wanexport is writing .*: waiting"):
        assert keep(bundle) is None
    builder.join()
    assert is_noted(bundle)


def test_a_bundle_that_cannot_be_written_loses_report_and_note_and_says_so(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(bundle)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    warning = keep(bundle)
    assert warning is not None and "\n" not in warning
    assert warning.startswith(
        f"the report was not saved, nor the parity noted in the manifest: {bundle} cannot be writ"
    )
    assert files_of(bundle) == before
    assert keep(bundle, tmp_path / "elsewhere") is None
    assert len(os.listdir(tmp_path / "elsewhere")) == 2


def test_nothing_is_written_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle / "reports").symlink_to(tmp_path / "elsewhere")
    for warning in (keep(bundle), bench(bundle / "reports", is_own=True)):
        assert warning is not None and "reports is a link" in warning
    assert not os.listdir(tmp_path / "elsewhere")
    assert not is_noted(bundle)


def test_a_snapshot_of_the_hubs_cache_is_not_written(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").rename(tmp_path / "blob")
    (bundle / "manifest.json").symlink_to(tmp_path / "blob")
    warning = keep(bundle)
    assert warning is not None and "manifest.json is a link" in warning
    assert (bundle / "manifest.json").is_symlink() and not (bundle / "reports").exists()


@pytest.mark.parametrize("free", [0, 200, 600])
def test_a_full_disk_costs_the_report_and_says_which(bundle: Path, free: int) -> None:
    with full_after(free):
        warning = keep(bundle)
    assert warning is not None
    assert f"{bundle}/" in warning and "No space left on device: free space" in warning
    saved = (bundle / "reports" / "compare-64x96x9-onnx-fp32.json").exists()
    assert warning.startswith("the report is saved, but" if saved else "the report was not saved")
    assert not [name for name in files_of(bundle) if name.endswith(".partial")]
    assert keep(bundle) is None and is_noted(bundle)


def test_leftovers_of_killed_reports_go(bundle: Path) -> None:
    (bundle / "reports").mkdir()
    saves: tuple[Callable[[], object], ...] = (
        lambda: keep(bundle),
        lambda: bench(bundle / "reports", is_own=True),
    )
    for save in saves:
        (bundle / "reports" / "x.json.0123abcd.partial").write_bytes(b"half")
        save()
        assert not [name for name in files_of(bundle) if name.endswith(".partial")]


def bench(folder: Path, *, is_own: bool) -> str | None:
    arm = {"arm": "onnx", "engine": "e", "median": 1.0, "min": 1.0, "max": 1.0}
    arm["percent_of_floor"] = 1.0
    result = {"engine": "e", "arms": [arm], "floor_seconds": 1.0, "model": "tiny", "machine": "m"}
    with warnings.catch_warnings(action="ignore"):
        return bench_report.save(result, folder, is_own=is_own)


def test_a_plot_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "bench-e.png").symlink_to(tmp_path / "precious")
    assert bench(tmp_path / "reports", is_own=False) is None
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "reports" / "bench-e.png").read_bytes().startswith(b"\x89PNG")
