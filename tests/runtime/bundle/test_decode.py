"""Whatever a manifest says is within bounds, or refused in one line; nothing is slow or hangs."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.bundle.small_bundle import change, manifest_of, put, small_bundle
from wanexport.exporter.bundle.lock import LOCK, SOFT_LOCK
from wanexport.exporter.bundle.place import JOURNAL, REPLACED
from wanexport.exporter.bundle.sweep import MARK
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.runtime.bundle.manifest import MANIFEST, MAX_BYTES, read_manifest, to_json
from wanexport.runtime.bundle.path import RESERVED
from wanexport.runtime.bundle.usable import why_unusable
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.errors import WanExportError

HUGE = 10**400
DEEP: Any = {}
for _ in range(500):
    DEEP = {"a": DEEP}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle", "onnx", "aoti", "tensorrt")


def refusal(bundle: Path) -> str:
    with pytest.raises(WanExportError) as refused:
        read_manifest(bundle)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 1000
    assert "delete" not in message
    return message


def test_what_is_written_is_read_back(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert not any(why_unusable(bundle, manifest, engine) for engine in manifest.engines)
    write_manifest(bundle, manifest)
    assert read_manifest(bundle) == manifest


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("schema", True), ("schema", 1.0), ("schema", None),
        ("model", ["a"]), ("model", "a\x1b[2J"), ("model", "x" * 5000), ("wanexport", 1),
        ("config.num_layers", 0), ("config.num_layers", HUGE), ("config.num_layers", True),
        ("config.num_layers", 2.0), ("config.dim", 2**62), ("config.eps", -1.0),
        ("config.eps", HUGE), ("config.freq_dim", 7), ("config.image_tokens", 3),
        ("config", DEEP), ("config", []), ("experts", "high_noise"), ("experts", [""]),
        ("weights.fp32.file.size", 2**53), ("weights.fp32.file.size", HUGE),
        ("weights.fp32.file.size", 5.0), ("weights.fp32.file.size", -1),
        ("weights.fp32.file.sha256", "0" * 63), ("weights.fp32.file.sha256", "z" * 64),
        ("weights.fp32.header_sha256", ""), ("weights.fp32.source", []),
        ("weights.fp32.source.path", 3), ("weights.fp32.source.hub", ["a/b"]),
        ("engines.0.files", {}), ("engines.1.files", {}), ("engines.2.files", {}),
        ("engines.0.geometry.height", 2**63), ("engines.0.geometry.frames", 0),
        ("engines.0.inputs.latent.shape", [1, 16, 3, 8, 2**63]),
        ("engines.0.inputs.latent.shape", [1] * 5000), ("engines.0.output.dtype", "a b"),
        ("engines.0.sampling.steps", 0), ("engines.0.sampling.steps", 10**9),
        ("engines.0.sampling.shift", HUGE), ("engines.0.sampling.shift", 0),
        ("engines.0.sampling.shift", -5.0), ("engines.0.sampling.fps", 0),
        ("engines.0.sampling.guidance", [5.0, 1e9]), ("engines.0.sampling.guidance", 5.0),
        ("engines.0.sampling.boundary", 0.5), ("engines.0.sampling.solver", "a\nb"),
        ("engines.0.target.device", "\0"), ("engines.1.target.arch", "\0"),
        ("engines.1.target.arch", "../.."), ("engines.1.target.arch", "x" * 300),
        ("engines.0.target", {"device": 1}), ("engines.0.backend", "x" * 300),
        ("engines.2.target.tensorrt", "new"), ("engines.0.key", "../x"),
        ("engines.1.parameters.block", "blocks"), ("engines.1.attention", {"12": 3}),
        ("engines.0.build.attention_score_bytes", []), ("engines.0.build", "x"),
        ("engines.0.build.attention_score_bytes", HUGE),
        ("engines.0.build.flops_per_forward", {}), ("engines.0.build.hardware_compatible", "no"),
        ("engines.0.proof.gate", "x"), ("engines.0.proof.error", HUGE), ("engines.0.proof", 1),
        ("engines.0.parity.passed", "yes"), ("engines.0.parity.error", []),
        ("engines.0.lint.host_sync", "0"), ("engines.0.lint.host_sync", HUGE),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_damage_in_one_line(
    bundle: Path, place: str, value: object
) -> None:
    message = refusal(change(bundle, place, value))
    assert "is damaged" in message and "build again into another folder with -o" in message
    assert "the weights stay good" in message


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "/etc/passwd", "../x", "weights/../../x", "a/./b", "a//b", "a/", "a\\b",
     "C:\\x", "a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "\ud800", "x" * 300, "x/" * 600 + "x",
     MANIFEST, "manifest.json/x", "weights/MANIFEST.json", ".lock", "manifest.partial.json"],
)  # fmt: skip
def test_a_path_that_is_no_artefacts_is_refused(bundle: Path, path: str) -> None:
    refusal(change(bundle, "weights.fp32.file.path", path))
    refusal(change(small_bundle(bundle / "other"), "engines.0.files.denoiser.path", path))


def test_the_bundles_own_names_are_reserved() -> None:
    assert {MANIFEST, JOURNAL, REPLACED, LOCK, SOFT_LOCK, MARK} == RESERVED


def test_two_records_of_one_file_that_differ_are_damage(bundle: Path) -> None:
    file = manifest_of(bundle)["weights"]["fp32"]["file"]
    change(bundle, "engines.0.files.denoiser", file)
    read_manifest(bundle)
    message = refusal(change(bundle, "engines.0.files.denoiser", {**file, "size": 1}))
    assert "has two sizes or hashes" in message


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "1" * 5000])
def test_what_is_no_json_is_refused_wherever_it_stands(bundle: Path, text: str) -> None:
    change(bundle, "engines.0.build.seconds", "HERE")
    path = bundle / MANIFEST
    path.write_text(path.read_text().replace('"HERE"', text))
    assert "is damaged" in refusal(bundle)


def test_a_name_that_stands_twice_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST
    path.write_text(path.read_text().replace('"model"', '"schema": 1, "model"', 1))
    assert "the same name twice" in refusal(bundle)


@pytest.mark.parametrize("place", ["config", "engines.0.proof", "weights.fp32.source", "new"])
def test_deep_nesting_is_refused_in_read_and_unread_fields(bundle: Path, place: str) -> None:
    change(bundle, place, DEEP)
    refusal(bundle)


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**6, b"\xff\xfe{\x00}\x00"])
def test_what_does_not_parse_is_damage(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert "is damaged" in refusal(bundle)


def test_a_manifest_larger_than_any_is_not_parsed(bundle: Path) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    assert f"is larger than {MAX_BYTES} bytes" in refusal(bundle)


def test_a_thousand_engines_fit_and_more_are_refused_soon(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["engines"] = [data["engines"][1]] * 1000
    put(bundle, data)
    started = time.process_time()
    assert len(read_manifest(bundle).engines) == 1000
    data["engines"] *= 2
    refusal(put(bundle, data))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", [MANIFEST, JOURNAL])
def test_a_pipe_or_a_device_does_not_hang(bundle: Path, name: str) -> None:
    path = bundle / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(WanExportError, match="is no regular file"):
        read_manifest(bundle, name)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(WanExportError, match="is no regular file"):
        read_manifest(bundle, name)


def test_another_schema_names_it_and_keeps_the_bundle(bundle: Path) -> None:
    for schema in (2, HUGE):
        message = refusal(change(bundle, "schema", schema))
        assert "install the wanexport that wrote it" in message


@pytest.mark.parametrize("place", ["", "config", "weights.fp32", "engines.0", "engines.0.sampling"])
def test_a_field_of_a_later_version_is_ignored(bundle: Path, place: str) -> None:
    before = read_manifest(bundle)
    change(bundle, f"{place}.later".strip("."), {"any": ["thing", None]})
    after = read_manifest(bundle)
    assert after.config == before.config and len(after.engines) == 3
    assert choose_engine(bundle, after).backend == "onnx"


@pytest.mark.parametrize("place", ["later", "weights.fp32.later", "engines.0.later"])
def test_a_field_of_a_later_version_outlives_a_write(bundle: Path, place: str) -> None:
    change(bundle, place, {"any": ["thing", None]})
    stated = manifest_of(bundle)
    write_manifest(bundle, read_manifest(bundle))
    assert manifest_of(bundle) == stated == json.loads(json.dumps(to_json(read_manifest(bundle))))


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("engines.0.backend", "quantum", "backend quantum"),
        ("engines.0.dtype", "fp8", "dtype fp8"),
        ("engines.0.target.device", "npu", "device npu"),
        ("engines.0.files.tokens", {"path": "x", "size": 0, "sha256": "0" * 64}, "file tokens"),
    ],
)
def test_what_a_later_version_made_is_one_engine_that_cannot_be_used(
    bundle: Path, place: str, value: object, what: str
) -> None:
    manifest = read_manifest(change(bundle, place, value))
    reasons = [why_unusable(bundle, manifest, engine) for engine in manifest.engines]
    assert f"has {what}, which this wanexport does not know: install" in reasons[0]
    assert reasons[1:] == ["", ""]


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("inputs.latent.shape", [0], "its inputs are latent"),
        ("inputs.latent.shape", [1, 16, 2, 0, 8], "its inputs are latent"),
        ("inputs.latent.shape", [1, 16, 3, 8, 16], "its inputs are latent"),
        ("inputs.text.dtype", "fp16", "its inputs are latent"),
        ("inputs.image", {"shape": [1]}, "its inputs are latent"),
        ("output.shape", [1, 16, 3, 8, 16], "it has output"),
        ("output.dtype", "bf16", "it has output"),
        ("geometry.width", 64, "its inputs are latent"),
        ("geometry.spatial_stride", 4, "VAE of stride 4"),
        ("weights_header_sha256", "0" * 64, "weights of another layout"),
        ("parameters.block", [], "its block takes other parameters"),
        ("parameters.head", ["head.head.weight"], "its head takes other parameters"),
        ("attention", {}, "attention to none keys"),
        ("attention", {"72": "sdpa", "9": "sdpa"}, "attention to 72, 9 keys, the model to 72, 8"),
    ],
)
def test_numbers_that_do_not_follow_from_the_config_never_reach_an_engine(
    bundle: Path, place: str, value: object, what: str
) -> None:
    manifest = read_manifest(change(bundle, f"engines.1.{place}", value))
    reason = why_unusable(bundle, manifest, manifest.engines[1])
    assert what in reason and reason.isprintable()
    assert "wanexport build --backend aoti --dtype fp32 --resolution 64x" in reason
    with pytest.raises(WanExportError, match="cannot be used"):
        choose_engine(bundle, manifest, backend="aoti")


def test_inputs_in_another_order_are_another_signature(bundle: Path) -> None:
    inputs = manifest_of(bundle)["engines"][1]["inputs"]
    change(bundle, "engines.1.inputs", dict(reversed(inputs.items())))
    manifest = read_manifest(bundle)
    assert "its inputs are text" in why_unusable(bundle, manifest, manifest.engines[1])


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 3), ("ffn_dim", 64), ("in_channels", 36)]
)
def test_a_config_that_is_not_the_engines_makes_none_usable(
    bundle: Path, name: str, value: int
) -> None:
    manifest = read_manifest(change(bundle, f"config.{name}", value))
    assert all(why_unusable(bundle, manifest, engine) for engine in manifest.engines)
