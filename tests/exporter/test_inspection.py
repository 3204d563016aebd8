"""`inspect` describes a bundle, and finds every file that is missing or altered."""

from collections.abc import Callable
from pathlib import Path

import pytest

from wanexport.exporter.inspection import inspect
from wanexport.graphs.config import PRESETS
from wanexport.graphs.signature import forward_flops
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry


def test_a_bundle_is_described(tiny_bundle: Path) -> None:
    record = inspect(tiny_bundle, verify=True)
    assert record["problems"] == []
    assert record["model"] == "tiny"
    assert record["parameters"] == pytest.approx(5.9e6, rel=0.01)  # 23.6 MB of fp32
    assert set(record["weights"]) == {"fp32", "fp16", "bf16"}
    artefacts = [*tiny_bundle.glob("engines/*/*/*"), *tiny_bundle.glob("weights/*/*")]
    assert record["bytes"] == sum(path.stat().st_size for path in artefacts)
    fp32 = next(engine for engine in record["engines"] if engine["dtype"] == "fp32")
    assert fp32["tokens"] == 3 * 4 * 6
    assert fp32["target"]["device"] == "cpu"
    assert fp32["proof"]["error"] <= fp32["proof"]["gate"]
    assert set(fp32["lint"].values()) == {0}
    flops = forward_flops(PRESETS["tiny"].config, Geometry(64, 96, 9))
    assert fp32["build"]["flops_per_forward"] == flops


def first_weights(bundle: Path) -> Path:
    return bundle / read_manifest(bundle).weights["fp32"].file.path


def first_engine(bundle: Path) -> Path:
    return bundle / read_manifest(bundle).engines[0].files["denoiser"].path


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_altered_weight_is_found_by_its_hash_alone(bundle: Path) -> None:
    flip_last_byte(first_weights(bundle))
    assert inspect(bundle)["problems"] == []
    (problem,) = inspect(bundle, verify=True)["problems"]
    assert str(first_weights(bundle)) in problem
    assert "was altered after the build" in problem


@pytest.mark.parametrize("file", [first_weights, first_engine])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "is missing from the bundle"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the manifest says"),
    ],
)
def test_missing_and_cut_files_are_found_without_hashing(
    bundle: Path, file: Callable[[Path], Path], harm: Callable[[Path], None], message: str
) -> None:
    harm(file(bundle))
    record = inspect(bundle)
    (problem,) = record["problems"]
    assert message in problem
    assert record["parameters"] is None


def test_an_altered_engine_is_found(bundle: Path) -> None:
    flip_last_byte(first_engine(bundle))
    (problem,) = inspect(bundle)["problems"]
    assert "was altered after the build" in problem


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WanExportError, match="is no bundle"):
        inspect(tmp_path)
