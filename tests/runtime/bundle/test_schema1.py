"""A manifest of schema 1 is read as one of schema 2 that says the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.quick import slow_but
from tests.runtime.bundle.first_schema import EXPERTS, FAMILIES, SIZES, engine, file, manifest
from tests.runtime.bundle.mutations import mutant
from wanexport.runtime.bundle.details import AotiDetails, OnnxDetails, TensorRtDetails
from wanexport.runtime.bundle.manifest import (
    BASE,
    DENOISER,
    SCHEMA,
    EngineRecord,
    FileRecord,
    Manifest,
    from_json,
    read_manifest,
    to_json,
)
from wanexport.runtime.bundle.signature import layout_sha256, program_of
from wanexport.runtime.bundle.usable import why_unread, why_unusable
from wanexport.runtime.errors import BundleError, WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import WHOLE
from wanexport.runtime.wan_config import WanConfig

# Hash of the weights' header of the tiny preset in fp32, as the version before wrote it.
TINY = "e7745a77624266e92dc12440e733a33cf47d25c84f0dfd0d576bfa2649030de2"


def read(folder: Path, data: Any) -> Manifest:
    """The manifest as it is read; written in schema 2 it is read the same."""
    (folder / "manifest.json").write_text(json.dumps(data))
    found = read_manifest(folder)
    assert found.schema == SCHEMA == json.loads(json.dumps(to_json(found)))["schema"]
    assert from_json(json.loads(json.dumps(to_json(found)))) == found
    return found


def read_engine(folder: Path, family: str, record: dict[str, Any]) -> EngineRecord:
    """The one engine of a family's bundle, which can be used."""
    found = read(folder, manifest(family, record))
    (only,) = found.engines
    assert why_unusable(folder, found, only) == "" and not only.unknown and not found.unknown
    return only


@pytest.mark.parametrize("backend", ["onnx", "aoti", "tensorrt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_known_by_its_channels_and_experts(
    family: str, backend: str, tmp_path: Path
) -> None:
    record = engine(family, backend)
    found = read_engine(tmp_path, family, record)
    bundle = read_manifest(tmp_path)
    inputs, outputs, tokens, has_experts, *_ = FAMILIES[family]
    sizes: dict[str, Any] = {**SIZES, "in_channels": inputs, "out_channels": outputs}
    config = WanConfig(family=family, image_tokens=tokens, **sizes)
    assert bundle.config == config and found.family == family
    assert bundle.experts == tuple(EXPERTS if has_experts else ())
    geometry = Geometry(**record["geometry"])
    program = program_of(config, geometry)
    assert found.program == (program if backend == "aoti" else program.whole())
    assert (found.role, found.dtype, found.geometry) == (DENOISER, "bf16", geometry)
    kept = ("backend", "key", "target", "lint", "proof", "parity", "build")
    assert {name: getattr(found, name) for name in kept} == {name: record[name] for name in kept}
    assert found.files == {role: FileRecord(**own) for role, own in record["files"].items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_base_set_of_the_same_layout(family: str, tmp_path: Path) -> None:
    data = manifest(family, engine(family, "onnx"))
    found = read(tmp_path, data)
    assert found.weights.keys() == data["weights"].keys()
    for label, record in found.weights.items():
        stated = data["weights"][label]
        assert (record.name, record.role, record.layout) == (BASE, DENOISER, FAMILIES[family][-1])
        assert (record.dtype, record.expert) == (stated["dtype"], stated["expert"])
        assert record.file == FileRecord(**stated["file"]) and record.source == stated["source"]
        assert record.content == stated["content"] and not record.unknown
    served = found.weights_of(found.engines[0].layout)
    assert [record.expert for record in served] == (EXPERTS if found.experts else [""])
    assert layout_sha256(found.config, "bf16") == FAMILIES[family][-1]


def test_the_layout_of_the_tiny_preset_is_what_it_was() -> None:
    config = WanConfig("t2v", 256, 1024, 2, 4, 16, 16, 0)
    assert layout_sha256(config, "fp32") == TINY


@pytest.mark.parametrize(
    ("nodes", "operator"),
    [
        ({"Attention": 8, "Gemm": 47}, "native"),
        ({"MultiHeadAttention": 8, "Gemm": 47}, "mha"),
        ({}, "native"),
    ],
)
def test_the_operator_of_an_onnx_graph_is_told_by_its_nodes(
    nodes: dict[str, int], operator: str, tmp_path: Path
) -> None:
    build = {"seconds": 1.5, "nodes": nodes, "attention_score_bytes": 41472}
    found = read_engine(tmp_path, "t2v", engine("t2v", "onnx", build=build))
    assert found.details == OnnxDetails(operator, 41472)
    assert found.build == {"seconds": 1.5, "nodes": nodes}
    assert [call.name for call in found.program.calls] == [WHOLE]


@pytest.mark.parametrize(
    ("family", "kernels", "by_kind"),
    [
        ("t2v", {"72": "fa4", "512": "cudnn"}, {"self": "fa4", "text": "cudnn"}),
        (
            "i2v",
            {"72": "fa4", "512": "cudnn", "257": "sdpa"},
            {"self": "fa4", "text": "cudnn", "image": "sdpa"},
        ),
        (
            "flf2v",
            {"514": "sdpa", "512": "sdpa", "72": "cudnn"},
            {"self": "cudnn", "text": "sdpa", "image": "sdpa"},
        ),
    ],
)
def test_kernels_by_number_of_keys_become_kernels_by_kind(
    family: str, kernels: dict[str, str], by_kind: dict[str, str], tmp_path: Path
) -> None:
    found = read_engine(tmp_path, family, engine(family, "aoti", attention=kernels))
    assert found.details == AotiDetails(by_kind)


def test_as_many_tokens_as_rows_of_text_had_one_kernel_which_both_kinds_get(tmp_path: Path) -> None:
    """A video of 8 latent frames of 8 x 8 tokens has 512, like the text."""
    record = engine("t2v", "aoti", attention={"512": "fa4"})
    record["geometry"] = {"height": 128, "width": 128, "frames": 29, "spatial_stride": 8}
    record["inputs"]["latent"]["shape"] = record["output"]["shape"] = [1, 16, 8, 16, 16]
    found = read_engine(tmp_path, "t2v", record)
    assert found.details == AotiDetails({"self": "fa4", "text": "fa4"})
    assert {spec.keys for spec in found.program.attention.values()} == {512}


def test_what_a_plan_serves_moves_from_the_log_to_its_details(tmp_path: Path) -> None:
    build = {"seconds": 1.5, "hardware_compatible": True, "version_compatible": False}
    found = read_engine(tmp_path, "t2v", engine("t2v", "tensorrt", build=build))
    assert found.details == TensorRtDetails(hardware_compatible=True, version_compatible=False)
    assert found.build == {"seconds": 1.5}


def test_plans_with_an_experts_weights_inside_are_read(tmp_path: Path) -> None:
    files = {f"denoiser-{expert}": file(f"engines/{expert}") for expert in EXPERTS}
    record = engine("t2v-a14b", "tensorrt", files=files)
    assert read_engine(tmp_path, "t2v-a14b", record).files.keys() == files.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": {"latent": {"shape": [1, 16, 3, 8, 16], "dtype": "fp32"}}}, "its inputs are"),
        ({"output": {"shape": [1, 16, 3, 8, 16], "dtype": "fp32"}}, "its output is"),
        ({"attention": {"72": "sdpa"}}, "kernels for attention of kind self, the model needs"),
        ({"attention": {}}, "kernels for attention of kind none"),
        ({"parameters": {"embed": [], "block": [], "head": []}}, "its embed takes other"),
        ({"parameters": {}}, "its embed takes other parameters"),
        ({"weights_header_sha256": "0" * 64}, "weights of another layout"),
        ({"files": {}}, "it has no file for its call embed"),
    ],
)
def test_a_record_that_does_not_follow_from_the_model_is_not_used(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    found = read(tmp_path, manifest("t2v", engine("t2v", "aoti", **change)))
    assert said in why_unusable(tmp_path, found, found.engines[0])


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": []}, {"inputs": None}, {"inputs": []}, {"parameters": {"block": 3}},
        {"parameters": {"block": [1]}}, {"attention": {"72": 3}}, {"build": 5}, {"output": []},
        {"weights_header_sha256": None}, {"sampling": {}}, {"backend": "quantum"},
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_read_is_kept_and_the_others_serve(
    change: dict[str, Any], tmp_path: Path
) -> None:
    whole, other = engine("t2v", "onnx"), engine("t2v", "aoti", **change)
    found = read(tmp_path, manifest("t2v", other, whole))
    reasons = [why_unusable(tmp_path, found, record) for record in found.engines]
    reasons += [why_unread(tmp_path, found, data) for data in found.unread]
    (reason,) = filter(None, reasons)
    assert len(reasons) == 2 and reason.startswith("engine ")
    assert "delete" not in reason and reason.isprintable()
    kept = [engine["files"] for engine in to_json(found)["engines"]]
    assert other["files"] in kept and whole["files"] in kept


@pytest.mark.parametrize(
    "change",
    [
        {"config": []}, {"config": {}}, {"weights": []}, {"weights": {"bf16": []}},
        {"weights": {"bf16": {}}}, {"experts": None}, {"experts": "high_noise"}, {"engines": {}},
        {"engines": [5]}, {"config": {**SIZES, "in_channels": 20, "out_channels": 16}},
        {"config": {**SIZES, "in_channels": 36, "out_channels": 16, "image_tokens": 5}},
        {"config": {**SIZES, "in_channels": "36", "out_channels": 16, "image_tokens": 0}},
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_damage_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is damaged .*the weights stay good") as refused:
        read(tmp_path, {**manifest("t2v", engine("t2v", "onnx")), **change})
    assert str(refused.value).isprintable()


def test_two_experts_of_a_model_that_has_one_are_damage(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is damaged .*no known Wan"):
        read(tmp_path, {**manifest("ti2v"), "experts": EXPERTS})


@pytest.mark.parametrize("count", slow_but([60, 300], 60))
def test_a_mutated_manifest_is_read_or_refused_in_one_line(count: int, tmp_path: Path) -> None:
    data = manifest("i2v", *(engine("i2v", backend) for backend in ("onnx", "aoti", "tensorrt")))
    path = tmp_path / "manifest.json"
    for seed in range(count):
        path.write_text(mutant(data, seed))
        try:
            found = read_manifest(tmp_path)
        except WanExportError as error:
            assert isinstance(error, BundleError) and str(error).isprintable(), seed
        else:
            reasons = [why_unusable(tmp_path, found, record) for record in found.engines]
            reasons += [why_unread(tmp_path, found, unread) for unread in found.unread]
            assert "".join(reasons).isprintable(), seed
