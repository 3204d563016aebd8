"""Whatever is changed in a manifest or a journal ends in success or in one line."""

import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.quick import slow_but
from tests.runtime.bundle.mutations import failures, mutant, read_inspect_choose
from tests.runtime.bundle.small_bundle import manifest_of, small_bundle
from wanexport.exporter.bundle.place import JOURNAL
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.runtime.bundle.manifest import Manifest, read_manifest

# A campaign: python -m tests.runtime.bundle.mutations 10000
COUNTS = pytest.mark.parametrize("count", slow_but([80, 400], 80))


def test_a_mutant_is_repeated_by_its_seed_and_differs(tmp_path: Path) -> None:
    whole = manifest_of(small_bundle(tmp_path / "bundle"))
    texts = [mutant(whole, seed) for seed in range(50)]
    assert texts == [mutant(whole, seed) for seed in range(50)]
    assert len(set(texts)) > 45


@COUNTS
@pytest.mark.filterwarnings("ignore::wanexport.runtime.errors.WanExportWarning")
def test_a_mutated_manifest_is_read_or_refused_in_one_line(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_bundle(tmp_path / "bundle", "onnx", "aoti", "tensorrt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert failures(bundle, range(count), read_inspect_choose) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # kB
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


@COUNTS
def test_a_mutated_journal_never_stops_a_build_nor_the_bundle(count: int, tmp_path: Path) -> None:
    whole = small_bundle(tmp_path / "whole")
    manifest, data = read_manifest(whole), manifest_of(whole)
    empty: Manifest = replace(manifest, weights={}, engines=())
    for seed in range(count // 4):
        bundle = Path(shutil.copytree(whole, tmp_path / "bundle"))
        (bundle / JOURNAL).write_text(mutant(data, seed))
        with open_bundle(bundle, empty) as writer:
            writer.find_engine(manifest.engines[0].key)
            writer.commit()
        assert read_manifest(bundle) == manifest
        assert {p.name for p in bundle.iterdir()} <= {
            "manifest.json",
            ".lock",
            "weights",
            "engines",
        }
        shutil.rmtree(bundle)
