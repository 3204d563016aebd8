"""From a checkpoint to a bundle whose engine gives diffusers' velocity."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxscript import opset23 as op
from safetensors.torch import load_file, save_file

from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
    write_diffusers,
    write_official,
)
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.exporter import build as build_module
from wanexport.exporter.backends.backend import Request, TensorRtOptions
from wanexport.exporter.backends.onnx import backend as onnx_backend
from wanexport.exporter.backends.onnx.attention import ATTENTION_FORMS
from wanexport.exporter.backends.order import BuildOptions, attention_for, geometry_for, make_order
from wanexport.exporter.backends.table import BACKENDS, default_backend
from wanexport.exporter.build import build
from wanexport.exporter.reference.eager import cut_to_ends, tensors_of_cut
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime import WanExportError, load
from wanexport.runtime.bundle.check import file_sha256
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes, program_of
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import EXPERTS, WanConfig

CAUSAL, PLAIN = PRESETS["causal-tiny"].config, PRESETS["tiny"].config


def build_small(model: Path, preset: str, bundle: Path, **options: Any) -> dict[str, Any]:
    geometry = small_geometry(small_config(preset))
    size = f"{geometry.height}x{geometry.width}"
    return build(str(model), resolution=size, frames=geometry.frames, output=bundle, **options)


@pytest.mark.parametrize("preset", slow_but(VARIANTS, *QUICK_PRESETS))
def test_the_engine_gives_diffusers_velocity(preset: str, tmp_path: Path) -> None:
    config = small_config(preset)
    two_experts = preset.endswith("a14b")
    models = {name: diffusers_model(config, seed) for seed, name in enumerate(EXPERTS)}
    if two_experts:
        for name, model in models.items():
            write_official(tmp_path / "model" / f"{name}_model", official_state(model), config)
    else:
        write_official(tmp_path / "model", official_state(models["high_noise"]), config)
    record = build_small(tmp_path / "model", preset, tmp_path / "bundle")
    assert record["engines"][0]["proof"]["error"] <= 1e-5
    denoiser = load(tmp_path / "bundle")
    for timestep in (950.0, 100.0):
        expert = "low_noise" if two_experts and timestep < 500 else "high_noise"
        inputs = forward_inputs(config, small_geometry(config), timestep, seed=2)
        theirs = diffusers_velocity(models[expert], config, inputs)
        assert relative_l2(denoiser(**inputs), theirs) <= 1e-5
    reference = torch.from_numpy(denoiser(**inputs))
    as_torch = denoiser(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    torch.testing.assert_close(as_torch, reference, atol=0, rtol=0)


def test_diffusers_layout_with_its_boundary(tmp_path: Path) -> None:
    config = small_config("i2v-a14b", num_layers=1)
    write_diffusers(tmp_path / "model", diffusers_model(config, 1), boundary_ratio=0.7)
    diffusers_model(config, 2).save_pretrained(tmp_path / "model" / "transformer_2")
    build_small(tmp_path / "model", "i2v-a14b", tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.experts == EXPERTS
    assert manifest.engines[0].sampling.boundary == 0.7
    assert set(manifest.weights) == {"high_noise-fp32", "low_noise-fp32"}
    layouts = {record.layout for record in manifest.weights.values()}
    assert layouts == {manifest.engines[0].layout}


def test_the_manifest_describes_every_file(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.model == "tiny"
    listed = {file.path: file for file in manifest.files()}
    on_disk = {
        path.relative_to(tiny_bundle).as_posix()
        for folder in ("weights", "engines")
        for path in (tiny_bundle / folder).rglob("*")
        if path.is_file()
    }
    assert set(listed) == on_disk
    for path, file in listed.items():
        assert file.sha256 == file_sha256(tiny_bundle / path)
        assert file.size == (tiny_bundle / path).stat().st_size
    assert not (tiny_bundle / "manifest.partial.json").exists()
    for engine in manifest.engines:
        assert set(engine.lint.values()) == {0}
        assert engine.proof["error"] <= engine.proof["gate"]
    methods = {engine.dtype: engine.proof["method"] for engine in manifest.engines}
    assert methods["fp32"] == "engine opened; cut compared"
    assert methods["fp16"] == "checker; cut compared"
    assert methods["bf16"] == "checker; cut retyped to fp32, compared"


def test_a_second_shape_adds_only_its_engine(bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("denoiser.*")}
    record = build("tiny", random_weights=0, resolution="64*64", frames=5, output=bundle)
    assert record["reused"] == ["weights fp32"]
    added = {p.relative_to(bundle).as_posix() for p in bundle.rglob("denoiser.*")} - {
        p.relative_to(bundle).as_posix() for p in before
    }
    assert added == {"engines/64x64x5/onnx-fp32/denoiser.onnx"}
    assert (bundle / added.pop()).stat().st_size < 1_000_000
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    again = build("tiny", random_weights=0, resolution="64x64", frames=5, output=bundle)
    assert again["reused"] == ["weights fp32", "engine 64x64x5/onnx-fp32"]


@pytest.fixture(scope="module")
def small_official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config("t2v-1.3b", num_layers=1)
    folder = tmp_path_factory.mktemp("official")
    return write_official(folder, official_state(diffusers_model(config)), config)


def test_a_bundle_keeps_to_one_models_weights(small_official: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small_official, tmp_path / "model"))
    build_small(model, "t2v-1.3b", tmp_path / "bundle")
    shutil.copytree(model, tmp_path / "moved")  # the same content elsewhere is the same model
    assert build_small(tmp_path / "moved", "t2v-1.3b", tmp_path / "bundle")["reused"]
    before = read_manifest(tmp_path / "bundle")
    file = model / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["head.head.weight"] *= 1.01
    save_file(tensors, file)
    for dtype in ("fp32", "bf16"):
        with pytest.raises(WanExportError, match=r"holds other weights, of .*model: name"):
            build_small(model, "t2v-1.3b", tmp_path / "bundle", dtype=dtype)
    assert read_manifest(tmp_path / "bundle") == before
    load(tmp_path / "bundle")


def test_a_lost_weights_file_is_converted_again(bundle: Path) -> None:
    path = bundle / read_manifest(bundle).weights["fp32"].file.path
    path.unlink()
    record = build("tiny", random_weights=0, resolution="64x96", frames=9, output=bundle)
    assert record["reused"] == ["engine 64x96x9/onnx-fp32"]
    load(bundle)


def test_a_changed_boundary_is_written_to_the_engine_that_is_there(tmp_path: Path) -> None:
    config = small_config("t2v-a14b", num_layers=1)
    model = tmp_path / "model"
    write_diffusers(model, diffusers_model(config, 1), boundary_ratio=0.7)
    diffusers_model(config, 2).save_pretrained(model / "transformer_2")
    build_small(model, "t2v-a14b", tmp_path / "bundle")
    (model / "model_index.json").write_text('{"boundary_ratio": 0.5}')
    record = build_small(model, "t2v-a14b", tmp_path / "bundle")
    (engine,) = read_manifest(tmp_path / "bundle").engines
    weights = ["weights high_noise-fp32", "weights low_noise-fp32"]
    assert record["reused"] == [*weights, f"engine {engine.name}"]
    assert load(tmp_path / "bundle").sampling.boundary == 0.5


def test_the_cut_takes_the_ends_and_the_full_model_itself() -> None:
    full, single = (small_config("t2v-1.3b", num_layers=layers) for layers in (4, 1))
    geometry = small_geometry(full)
    cut, program = (program_of(config, geometry) for config in (cut_to_ends(full), full))
    names = tensors_of_cut(cut, program)
    assert names["blocks.0.ffn.0.weight"] == "blocks.0.ffn.0.weight"
    assert names["blocks.1.ffn.0.weight"] == "blocks.3.ffn.0.weight"
    assert names["head.head.weight"] == "head.head.weight"
    assert set(names) == set(parameter_shapes(cut_to_ends(full)))
    for config in (full, single):
        own = program_of(config, geometry)
        same = tensors_of_cut(own, own)
        assert same == {name: name for name in parameter_shapes(config)}


def test_the_cut_of_a_causal_model_keeps_with_the_last_layer() -> None:
    full = replace(CAUSAL, num_layers=5)
    geometry = Geometry(64, 96, 33, chunk=3, cache=9)
    cut, program = (program_of(config, geometry) for config in (cut_to_ends(full), full))
    names = tensors_of_cut(cut, program)
    assert names["blocks.0.self_attn.k.weight"] == "blocks.0.self_attn.k.weight"
    assert names["blocks.1.self_attn.k.weight"] == "blocks.4.self_attn.k.weight"
    assert set(names) == set(parameter_shapes(cut_to_ends(full)))


def test_a_file_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('imported from the cwd')")
    monkeypatch.chdir(tmp_path)
    build("tiny", random_weights=0, resolution="64x96", frames=9, output="b")


@pytest.mark.parametrize(
    ("has_gpu", "obstacle", "backends", "devices", "dtype"),
    [
        (False, "none", ("onnx", "aoti"), ("cpu", "cpu"), "fp32"),
        (True, "", ("onnx", "aoti"), ("cuda", "cuda"), "bf16"),
        (True, "a CPU's package", ("onnx", "aoti"), ("cpu", "cuda"), "bf16"),
        (True, "a CPU's package", ("onnx",), ("cpu",), "fp32"),
        (False, "none", ("onnx", "tensorrt-rtx"), ("cpu", "cpu"), "bf16"),
    ],
)
def test_each_backend_has_its_device_and_all_one_precision(
    has_gpu: bool,
    obstacle: str,
    backends: tuple[str, ...],
    devices: tuple[str, ...],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(onnx_backend, "gpu_obstacle", lambda: obstacle)
    for name in backends:  # what this machine's libraries say of a GPU is not asked
        monkeypatch.setattr(BACKENDS[name], "targets", lambda *_: [{"device": "cpu"}])
    order = make_order(BuildOptions("64x96", 9, backends=backends))
    assert tuple(ordered.device for ordered in order.engines) == devices
    assert order.dtype == dtype
    assert default_backend(None) == ("aoti" if has_gpu else "onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu': expected one of cpu, cuda, cuda:N"),
        ({"device": "cuda:x"}, "unknown device 'cuda:x'"),
        ({"backends": ["trt"]}, "unknown backend 'trt': expected of onnx, aoti"),
        ({"backends": []}, "no backends: expected of onnx"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8': expected of fp32, bf16, fp16"),
        ({"proof": "some"}, "unknown proof 'some': expected of ends, full"),
        ({"family": "vace"}, "unknown family 'vace': expected of t2v, i2v"),
        ({"attention": "cudnn"}, "attention cudnn: only engines of aoti .* add --backend aoti$"),
        ({"attention": "native"}, "attention native: only engines of aoti .* add --backend aoti$"),
        (
            {"backends": ["aoti"], "attention": "native"},
            "backend aoti has no attention 'native': expected of fa4, cudnn, sdpa",
        ),
        (
            {"backends": ["aoti"], "attention_operator": "mha"},
            "attention operator mha: .* add --backend onnx or tensorrt or tensorrt-rtx$",
        ),
        (
            {"attention_operator": "decomposed"},
            "backend onnx has no attention operator 'decomposed': expected of native, mha",
        ),
        (
            {"tensorrt": TensorRtOptions(workspace=2**30, bake_weights=True)},
            "workspace, bake weights: only TensorRT .* add --backend tensorrt or tensorrt-rtx$",
        ),
    ],
)
def test_what_no_build_can_make_is_a_bad_request(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make_order(BuildOptions("64x96", 9, **{"backends": ["onnx"], **options}))


@pytest.mark.parametrize(
    ("options", "chunk", "cache"),
    [
        ({}, 3, 9), ({"chunk": 1}, 1, 9), ({"cache": 7}, 3, 7), ({"chunk": 3, "cache": 3}, 3, 3),
        ({"chunk": 12}, 12, 12), ({"frames": 1}, 1, 1), ({"frames": 5}, 2, 2),
        ({"frames": 161, "cache": 21}, 3, 21),
    ],
)  # fmt: skip
def test_a_causal_model_is_built_in_chunks(options: dict[str, Any], chunk: int, cache: int) -> None:
    asked = BuildOptions(**{"resolution": "64x96", "frames": 33, "backends": ["onnx"], **options})
    geometry = geometry_for(CAUSAL, make_order(asked), asked)
    assert (geometry.chunk, geometry.cache, geometry.frames) == (chunk, cache, asked.frames)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            PLAIN,
            {"chunk": 3},
            "^--chunk: only a causal model .*t2v is none; .*--family self-forcing$",
        ),
        (PLAIN, {"chunk": 3, "cache": 9}, "^--chunk and --cache: only a causal model"),
        (CAUSAL, {"chunk": 3, "cache": 2}, "a chunk of 3 latent frames and a cache of 2: expected"),
        (CAUSAL, {"chunk": 0}, "^--chunk 0: expected latent frames from 1$"),
        (CAUSAL, {"cache": 0}, "a chunk of 3 latent frames and a cache of 0: expected"),
    ],
)
def test_chunks_that_cannot_be_are_a_bad_request(
    config: WanConfig, options: dict[str, Any], message: str
) -> None:
    asked = BuildOptions("64x96", 33, backends=["onnx"], **options)
    with pytest.raises(BadRequest, match=message):
        geometry_for(config, make_order(asked), asked)


def test_kernels_and_operators_of_attention_go_each_to_its_backends() -> None:
    asked = BuildOptions(
        "64x96", 9, backends=["onnx", "aoti"], device="cpu", attention="sdpa",
        attention_operator="mha",
    )  # fmt: skip
    told = {name: attention_for(kind, asked) for name, kind in BACKENDS.items()}
    others = dict.fromkeys(("onnx", "tensorrt", "tensorrt-rtx"), "mha")
    assert told == {"aoti": "sdpa", **others}


def request_of(**changes: Any) -> Request:
    config = small_config("t2v-a14b")
    geometry = small_geometry(config)
    sampling = sampling_defaults(config, EXPERTS, geometry)
    target = {"device": "cpu", "onnxruntime": "1"}
    request = Request(config, geometry, sampling, "onnx", "fp32", "cpu", target, "native")
    return replace(request, **changes)


@pytest.mark.parametrize(("device", "attention"), [("cpu", "native"), ("cuda:1", "mha")])
def test_an_onnx_request_leaves_no_operator_to_choose(device: str, attention: str) -> None:
    assert onnx_backend.resolve(request_of(device=device, attention=None)).attention == attention
    assert onnx_backend.resolve(request_of(device=device, attention="mha")).attention == "mha"


def test_a_full_proof_runs_every_block(tmp_path: Path) -> None:
    options = {"random_weights": 0, "resolution": "64x96", "frames": 9, "proof": "full"}
    record = build("tiny", output=tmp_path / "b", **options)  # type: ignore[arg-type]
    assert record["engines"][0]["proof"]["blocks"] == 4
    options["proof"] = "ends"  # less than what is proven already
    record = build("tiny", output=tmp_path / "b", **options)  # type: ignore[arg-type]
    assert record["reused"] == ["weights fp32", "engine 64x96x9/onnx-fp32"]
    assert record["engines"][0]["proof"]["blocks"] == 4


@pytest.mark.slow  # test_proofs has others
def test_a_failed_proof_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ATTENTION_FORMS["native"]

    def unscaled(q: Any, k: Any, v: Any, kind: str) -> Any:
        return right(op.Mul(q, op.CastLike(op.Constant(value_float=0.1), q)), k, v, kind)

    monkeypatch.setitem(ATTENTION_FORMS, "native", unscaled)
    with pytest.raises(WanExportError, match="failed its proof: relative L2 error"):
        build("tiny", random_weights=0, resolution="32x32", frames=1, output=tmp_path / "b")
    left = [path.name for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert not (tmp_path / "b" / "manifest.json").exists()
    assert "denoiser.onnx" not in left


def test_a_fp16_overflow_is_refused(small_official: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small_official, tmp_path / "model"))
    file = model / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.ffn.0.bias"][:] = 6e4
    tensors["blocks.0.ffn.2.weight"][:] = 1.0
    save_file(tensors, file)
    with pytest.raises(WanExportError, match="the fp16 engine gives NaN or Inf"):
        build_small(model, "t2v-1.3b", tmp_path / "bundle", dtype="fp16")


def wrong_model(tmp_path: Path, official: Path) -> tuple[Path, str]:
    config = small_config("t2v-1.3b", num_layers=3)
    write_official(tmp_path / "other", official_state(diffusers_model(config)), config)
    build_small(official, "t2v-1.3b", tmp_path / "bundle")
    return tmp_path / "other", "of another config than this t2v"


def a_file(tmp_path: Path, official: Path) -> tuple[Path, str]:
    (tmp_path / "bundle").write_text("")
    return official, "is a file"


def a_folder_of_something_else(tmp_path: Path, official: Path) -> tuple[Path, str]:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("")
    return official, "exists and is no bundle"


@pytest.mark.parametrize("prepare", [wrong_model, a_file, a_folder_of_something_else])
def test_an_output_that_is_something_else_is_refused_untouched(
    prepare: Callable[[Path, Path], tuple[Path, str]], small_official: Path, tmp_path: Path
) -> None:
    model, message = prepare(tmp_path, small_official)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WanExportError, match=message):
        build_small(model, "t2v-1.3b", tmp_path / "bundle")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_record_is_json(bundle: Path) -> None:
    before = read_manifest(bundle)
    record = build("tiny", random_weights=0, resolution="64x96", frames=9, output=bundle)
    assert read_manifest(bundle) == before
    assert json.loads(json.dumps(record))["tokens"] == 72
    assert record["engines"][0]["build"]["flops_per_forward"] > 0


@pytest.mark.slow
def test_the_1_3b_builds_at_480p_in_4_gib(tmp_path: Path) -> None:
    record = build(random_weights=0, resolution="480x832", frames=81, output=tmp_path / "b")
    (engine,) = record["engines"]
    assert record["tokens"] == 32760
    assert record["peak_rss_bytes"] <= 4 * 2**30
    assert sum(file["size"] for file in engine["files"].values()) <= 8e6
    assert engine["proof"]["error"] <= 1e-5
    assert np.isfinite(engine["proof"]["error"])


def test_a_size_that_no_wan_takes_is_refused_before_a_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_module, "resolve", lambda *_, **__: pytest.fail("it was asked for"))
    for resolution, frames in (("481x833", 81), ("480x832", 80)):
        with pytest.raises(WanExportError):
            build("org/repo", resolution=resolution, frames=frames)
    with pytest.raises(WanExportError, match="output is empty"):
        build("org/repo", resolution="480x832", frames=81, output="")
