"""`inspect` describes a bundle, and finds every file that is missing or altered."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.inspection import inspect
from wanexport.graphs.config import PRESETS
from wanexport.graphs.signature import forward_flops
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry


def test_a_bundle_is_described(tiny_bundle: Path) -> None:
    record = inspect(tiny_bundle, verify=True)
    assert record["problems"] == []
    assert (record["model"], record["family"], record["unread"]) == ("tiny", "t2v", [])
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


def test_weights_sets_are_described_with_what_reads_them(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    style = replace(manifest.weights["fp32"], name="style")
    write_manifest(bundle, replace(manifest, weights={**manifest.weights, "style-fp32": style}))
    sets = {(s["name"], s["dtype"]): s for s in inspect(bundle)["sets"]}
    assert set(sets) == {("base", "fp32"), ("base", "fp16"), ("base", "bf16"), ("style", "fp32")}
    own, other = sets["style", "fp32"], sets["base", "fp32"]
    assert own["experts"] == {"": "style-fp32"} and other["experts"] == {"": "fp32"}
    assert own["role"] == "denoiser" and own["layout"] == other["layout"]
    assert own["engines"] == other["engines"] == ["64x96x9/onnx-fp32"]


def with_later_engine(bundle: Path, *, alone: bool = False) -> None:
    """Add an engine of a kind that no version has yet; alone says in the place of the others."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    file = {"path": "engines/later/engine.bin", "size": 5, "sha256": sha256(b"later").hexdigest()}
    later = {"role": "denoiser", "backend": "vulkan", "dtype": "int4", "files": {"all": file}}
    data["engines"] = [*([] if alone else data["engines"]), later]
    path.write_text(json.dumps(data))
    (bundle / "engines" / "later").mkdir()
    (bundle / "engines" / "later" / "engine.bin").write_bytes(b"later")


def test_an_engine_of_a_later_version_is_shown_and_its_files_checked(bundle: Path) -> None:
    with_later_engine(bundle)
    record = inspect(bundle)
    (later,) = record["unread"]
    assert later["backend"] == "vulkan" and record["problems"] == []
    result = CliRunner().invoke(cli, ["inspect", str(bundle)])
    assert result.exit_code == 0
    assert "has backend vulkan, which this wanexport does not know" in result.stdout
    (bundle / "engines" / "later" / "engine.bin").write_bytes(b"other")
    (problem,) = inspect(bundle)["problems"]
    assert "was altered after the build" in problem


def test_a_bundle_of_later_engines_alone_is_a_problem(bundle: Path) -> None:
    with_later_engine(bundle, alone=True)
    (problem,) = inspect(bundle)["problems"]
    assert "install the one that built it" in problem and "build another engine" in problem


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
