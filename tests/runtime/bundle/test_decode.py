"""Whatever a manifest says is within bounds, or refused in one line; nothing is slow or hangs.

What is wrong with one engine's record makes that engine unusable, and nothing else.
"""

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
from wanexport.runtime.bundle.manifest import MANIFEST, MAX_BYTES, read_manifest
from wanexport.runtime.bundle.path import RESERVED
from wanexport.runtime.bundle.usable import why_unread, why_unusable
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BundleError

HUGE = 10**400
DEEP: Any = {}
for _ in range(500):
    DEEP = {"a": DEEP}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle", "onnx", "aoti", "tensorrt")


def refusal(bundle: Path) -> str:
    with pytest.raises(BundleError) as refused:
        read_manifest(bundle)
    return checked(str(refused.value))


def checked(message: str) -> str:
    """The message, which is one short line and advises to throw nothing away."""
    assert message.isprintable() and len(message) < 1000
    assert "delete" not in message and "remove" not in message
    return message


def fault_of_one_engine(bundle: Path) -> str:
    """Why the one engine that cannot be used cannot."""
    manifest = read_manifest(bundle)
    assert len(manifest.engines) + len(manifest.unread) == 3
    found = [why_unread(bundle, manifest, data) for data in manifest.unread]
    found += [why_unusable(bundle, manifest, engine) for engine in manifest.engines]
    (reason,) = filter(None, found)
    return checked(reason)


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
        ("weights.fp32.layout", ""), ("weights.fp32.source", []), ("weights.fp32.name", "a b"),
        ("weights.fp32.role", 1), ("weights.fp32.dtype", None), ("weights.fp32", []),
        ("weights.fp32.source.path", 3), ("weights.fp32.source.hub", ["a/b"]), ("weights", []),
        ("family", 1), ("family", "a b"), ("family", None), ("engines", {}), ("engines.0", 5),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_damage_in_one_line(
    bundle: Path, place: str, value: object
) -> None:
    message = refusal(change(bundle, place, value))
    assert "is damaged" in message and "build again into another folder with -o" in message
    assert "the weights stay good" in message


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("0.files", {}), ("1.files", {}), ("2.files", {}), ("0.files", []), ("1.files.embed", 1),
        ("0.files.denoiser.size", "5"), ("0.geometry.height", 2**63), ("0.geometry.frames", 0),
        ("0.program.inputs.latent.shape", [1, 16, 3, 8, 2**63]),
        ("0.program.inputs.latent.shape", [1] * 5000), ("0.program.outputs.velocity.dtype", "a b"),
        ("1.program", {}), ("1.program.calls", []), ("1.program.calls", {}),
        ("1.program.calls.1.repeat", HUGE), ("1.program.calls.1.repeat", 0),
        ("1.program.calls.1.repeat", 3), ("1.program.calls.0.name", "../x"),
        ("1.program.calls.0.reads", "latent"), ("1.program.calls.1.parameters", "blocks"),
        ("1.program.calls.2.reads", ["x", "nothing"]), ("1.program.calls.1.state", ["memory"]),
        ("1.program.values.x.shape", [0]), ("1.program.attention.self.keys", 9),
        ("0.sampling.steps", 0), ("0.sampling.steps", 10**9), ("0.sampling.steps", True),
        ("0.sampling.shift", HUGE), ("0.sampling.shift", 0), ("0.sampling.shift", -5.0),
        ("0.sampling.fps", 0), ("0.sampling.guidance", [5.0, 1e9]), ("0.sampling.guidance", 5.0),
        ("0.sampling.boundary", 0.5), ("0.sampling.solver", "a\nb"), ("0.layout", ""),
        ("0.target.device", "\0"), ("1.target.arch", "\0"), ("1.target.arch", "../.."),
        ("1.target.arch", "x" * 300), ("0.target", {"device": 1}), ("0.target", {}),
        ("0.backend", "x" * 300), ("0.backend", None), ("0.role", "\x1b[2J"), ("0.dtype", HUGE),
        ("2.target", {"device": "cuda", "tensorrt": "1"}), ("2.target.tensorrt", "new"),
        ("2.target", {"device": "cuda", "arch": "sm89"}), ("2.target.arch", "x86"),
        ("2.target.device", "cpu"), ("0.key", "../x"), ("0.details", []),
        ("1.details.attention", {"self": 3}), ("1.details.attention", {}),
        ("1.details.attention", {"self": "sdpa", "image": "sdpa"}),
        ("0.details.attention_score_bytes", []), ("0.details.attention_score_bytes", HUGE),
        ("2.details.hardware_compatible", "no"), ("0.build", "x"),
        ("0.build.flops_per_forward", {}), ("0.family", "i2v"), ("0.family", 1),
        ("0.proof.gate", "x"), ("0.proof.error", HUGE), ("0.proof", 1),
        ("0.parity.passed", "yes"), ("0.parity.error", []),
        ("0.lint.host_sync", "0"), ("0.lint.host_sync", HUGE),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_engine_is_its_own(bundle: Path, place: str, value: object) -> None:
    """Without a record that can be read it is kept as it is: a write loses nothing of it."""
    reason = fault_of_one_engine(change(bundle, f"engines.{place}", value))
    assert reason.startswith("engine ") and "build " in reason
    stated = manifest_of(bundle)
    write_manifest(bundle, read_manifest(bundle))
    engines = {json.dumps(engine) for engine in manifest_of(bundle)["engines"]}
    assert engines == {json.dumps(engine) for engine in stated["engines"]}


def test_a_program_of_another_backends_form_is_not_opened(bundle: Path) -> None:
    """A graph cannot be called in parts, nor a package whole: neither checks what it is given."""
    onnx, aoti, _ = manifest_of(bundle)["engines"]
    for number, other in ((0, aoti), (1, onnx)):
        whole = small_bundle(bundle / str(number), "onnx", "aoti", "tensorrt")
        for name in ("program", "files"):
            change(whole, f"engines.{number}.{name}", other[name])
        reason = fault_of_one_engine(whole)
        assert "calls are not the model's" in reason or "other parameters" in reason


@pytest.mark.parametrize("files", [["high_noise"], ["low_noise"], ["high_noise", "low_noise"]])
def test_a_plan_is_there_for_every_expert(bundle: Path, files: list[str]) -> None:
    file = manifest_of(bundle)["engines"][2]["files"]["denoiser"]
    change(bundle, "engines.2.files", {f"denoiser-{expert}": file for expert in files})
    if len(files) == 2:
        manifest = read_manifest(bundle)
        assert not why_unusable(bundle, manifest, manifest.engines[2])
    else:
        assert "has no plan for an expert" in fault_of_one_engine(bundle)


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
    data["engines"].append({})
    refusal(put(bundle, data))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", [MANIFEST, JOURNAL])
def test_a_pipe_or_a_device_does_not_hang(bundle: Path, name: str) -> None:
    path = bundle / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(BundleError, match="is no regular file"):
        read_manifest(bundle, name)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="is no regular file"):
        read_manifest(bundle, name)


def test_another_schema_names_it_and_keeps_the_bundle(bundle: Path) -> None:
    for schema in (0, 3, HUGE):
        message = refusal(change(bundle, "schema", schema))
        assert "install the wanexport that wrote it" in message


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("program.inputs.latent.shape", [0], "its inputs are latent"),
        ("program.inputs.latent.shape", [1, 16, 2, 0, 8], "its inputs are latent"),
        ("program.inputs.latent.shape", [1, 16, 3, 8, 16], "its inputs are latent"),
        ("program.inputs.text.dtype", "fp16", "its inputs are latent"),
        ("program.inputs.text.draw", "normal", "[1, 8, 32] fp32 normal, the model takes"),
        ("program.inputs.image", {"shape": [1]}, "its inputs are latent"),
        ("program.outputs.velocity.shape", [1, 16, 3, 8, 16], "its output is velocity"),
        ("program.outputs.velocity.dtype", "bf16", "its output is velocity"),
        ("geometry.width", 64, "its inputs are latent"),
        ("geometry.spatial_stride", 4, "VAE of stride 4"),
        ("layout", "0" * 64, "weights of another layout"),
        ("family", "ti2v", "it is of family ti2v, the model of t2v"),
        ("program.calls.1.parameters", [], "its block takes other parameters"),
        ("program.calls.2.parameters", ["head.head.weight"], "its head takes other parameters"),
        ("program.calls.1.writes", ["context"], "its calls are not the model's"),
        ("program.calls.1.repeat", 1, "its calls are not the model's"),
        ("program.attention.self.count", 1, "its calls are not the model's"),
        ("program.values.context.dtype", "fp32", "its calls are not the model's"),
        ("program.attention", {}, "it has attention of kind none, the model self, text"),
        ("details.attention", {}, "kernels for attention of kind none, the model needs self, t"),
        ("details.attention", {"self": "sdpa"}, "attention of kind self, the model needs self, t"),
    ],
)
def test_numbers_that_do_not_follow_from_the_config_never_reach_an_engine(
    bundle: Path, place: str, value: object, what: str
) -> None:
    manifest = read_manifest(change(bundle, f"engines.1.{place}", value))
    reason = why_unusable(bundle, manifest, manifest.engines[1])
    assert what in reason and reason.isprintable()
    assert "wanexport build --backend aoti --dtype fp32 --resolution 64x" in reason
    with pytest.raises(BundleError, match="cannot be used"):
        choose_engine(bundle, manifest, EngineOptions(backend="aoti"))


def test_a_plain_model_is_not_made_in_chunks(bundle: Path) -> None:
    change(bundle, "engines.1.geometry.chunk", 1)
    manifest = read_manifest(change(bundle, "engines.1.geometry.cache", 2))
    reason = why_unusable(bundle, manifest, manifest.engines[1])
    assert "x9-chunk1-cache2 is of another kind than family t2v; build it again" in reason


def test_inputs_in_another_order_are_another_signature(bundle: Path) -> None:
    inputs = manifest_of(bundle)["engines"][1]["program"]["inputs"]
    change(bundle, "engines.1.program.inputs", dict(reversed(inputs.items())))
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
