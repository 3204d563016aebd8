"""What a build does for the VAE, with text for packages; and once with packages that run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.oracles.small_vae import official_file
from tests.runtime.bundle.small_bundle import small_bundle
from tests.runtime.parts.vae_bundle import (
    add_vae,
    asked_for,
    small_request,
    stub_compiler,
    vae_bundle,
)
from wanexport.exporter.backends.backend import VaeRequest
from wanexport.exporter.build import build
from wanexport.exporter.child.process import run_command
from wanexport.exporter.cli.main import cli
from wanexport.exporter.inspection import inspect, list_bundle
from wanexport.exporter.key import engine_key
from wanexport.exporter.lint.onnx import lint
from wanexport.exporter.sets.remove import remove
from wanexport.exporter.sets.vae import choose_chunk, order_vae
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import load
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.vae import open_vae
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.vae_memory import decoding_flops, needed_bytes

FULL = {"Wan2.1": VaeConfig(16, 96, 96, False), "Wan2.2": VaeConfig(48, 160, 256, True)}
GIGA = 10**9


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return official_file("Wan2.1", tmp_path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle")


def engines(bundle: Path) -> list[str]:
    return [engine.name.partition("/")[2] for engine in read_manifest(bundle).engines]


def test_a_vae_engine_stands_beside_the_denoisers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = vae_bundle(tmp_path, monkeypatch, vae_chunk=3)
    record = inspect(bundle, verify=True)
    assert not record["problems"]
    assert record["parameters"] == inspect(small_bundle(tmp_path / "plain"))["parameters"]
    listed = list_bundle(bundle)
    assert [(own["name"], own["role"]) for own in listed["sets"]] == [
        ("base", "denoiser"),
        ("base", "vae"),
    ]
    (_, engine) = record["engines"]
    assert not engine["unusable"] and engine["details"]["sizes"]["decode_chunk"] == 3
    assert lint(bundle)["graphs"][engine["name"]]["recorded"]
    for command in (["inspect"], ["ls"]):
        shown = CliRunner().invoke(cli, [*command, str(bundle)])
        assert shown.exit_code == 0 and "vae-aoti-fp32" in shown.output


def test_what_was_built_is_reused(bundle: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = stub_compiler(monkeypatch)
    assert add_vae(bundle, vae) == []
    reused = add_vae(bundle, vae)
    assert [what.partition(" ")[0] for what in reused] == ["weights", "engine"]
    add_vae(bundle, vae, vae_chunk=2)
    assert len(compiled) == 2 and len(engines(bundle)) == 2
    assert read_manifest(bundle).engines[1].details.sizes.decode_chunk == 2
    assert "weights vae-fp32" in add_vae(bundle, vae, vae_chunk=2)


def test_removing_the_last_engine_takes_its_weights_along(
    bundle: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_compiler(monkeypatch)
    add_vae(bundle, vae)
    add_vae(bundle, vae, vae_dtype="bf16")
    both = [engine.name for engine in read_manifest(bundle).engines]
    record = remove(bundle, both[1])
    assert len(record["files"]) == 5 and engines(bundle)[0].startswith("onnx")
    assert list(read_manifest(bundle).weights) == ["fp32", "vae-bf16"]
    with pytest.raises(BadRequest, match="no weights set and no engine"):
        remove(bundle, both[1])


def test_another_vae_is_refused_until_the_first_is_removed(
    bundle: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    stub_compiler(monkeypatch)
    add_vae(bundle, vae)
    state = torch.load(vae, weights_only=True)
    state["conv1.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(BadRequest, match=r"holds another VAE, of .*remove its engine first"):
        add_vae(bundle, tmp_path / "other.pth")
    remove(bundle, read_manifest(bundle).engines[1].name)
    add_vae(bundle, tmp_path / "other.pth")


def test_a_failed_proof_leaves_the_bundle_as_it_was(
    bundle: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanexport.exporter.backends.aoti import backend as aoti_backend

    stub_compiler(monkeypatch)
    before = read_manifest(bundle)

    def fail(*_: Any) -> None:
        raise WanExportError("the built engine failed its proof")

    monkeypatch.setattr(aoti_backend, "prove_vae", fail)
    with pytest.raises(WanExportError, match="failed its proof"):
        add_vae(bundle, vae)
    assert read_manifest(bundle) == before
    assert not list((bundle / "engines").rglob("*.pt2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae_dtype": "bf16"}, "--vae-dtype: only an engine of the VAE takes this; add --parts"),
        ({"vae_chunk": 2, "vae_tf32": True}, "--vae-chunk and --vae-tf32: only an engine of the"),
        ({"parts": True}, "random weights have no VAE beside them: name one with --vae"),
        ({"vae": "no/such.pth"}, "no/such.pth does not exist"),
        ({"vae": "VAE", "vae_dtype": "fp16"}, "unknown VAE dtype 'fp16': expected of bf16, fp32"),
        ({"vae": "VAE", "vae_chunk": 6}, "--vae-chunk 6: expected from 1 to 5"),
        ({"vae": "VAE22"}, r"latents of 48 channels, one for 16x16 pixels; the model takes 16"),
    ],
)
def test_what_cannot_be_built_is_refused(
    bundle: Path, vae: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "vae" in options:
        other = official_file("Wan2.2", tmp_path)
        options["vae"] = {"VAE": vae, "VAE22": other}.get(options["vae"], options["vae"])
    with pytest.raises(BadRequest, match=message):
        order_vae(small_request(read_manifest(bundle)), {}, asked_for(**options))


def test_a_build_without_parts_has_none(bundle: Path) -> None:
    assert order_vae(small_request(read_manifest(bundle)), {}, asked_for()) is None


def test_the_checkpoints_own_vae_is_found_beside_the_model(bundle: Path, vae: Path) -> None:
    source = {"path": str(vae.parent)}
    ordered = order_vae(small_request(read_manifest(bundle)), source, asked_for(parts=True))
    assert ordered is not None and ordered.checkpoint.path == vae


@pytest.mark.parametrize("change", [{"vae_chunk": 2}, {"vae_tf32": True}, {"vae_dtype": "bf16"}])
def test_the_key_depends_on_how_the_engine_is_cut(
    bundle: Path, vae: Path, change: dict[str, Any]
) -> None:
    def key(**options: Any) -> str:
        request = small_request(read_manifest(bundle))
        ordered = order_vae(request, {}, asked_for(vae=vae, **options))
        assert ordered is not None and isinstance(ordered.request, VaeRequest)
        return engine_key(ordered.request)

    assert key() == key() != key(**change)


@pytest.mark.parametrize(
    ("version", "size", "frames", "room", "expected"),
    [
        ("Wan2.1", (480, 832), 81, 21 * GIGA, 5),  # 20 later latent frames in 4 calls
        ("Wan2.1", (480, 832), 81, 7 * GIGA, 4),
        ("Wan2.1", (480, 832), 81, 0, 1),
        ("Wan2.1", (480, 832), 5, 21 * GIGA, 1),
        ("Wan2.1", (480, 832), 29, 21 * GIGA, 1),  # 7 in 7 calls: with 4 an eighth is waste
        ("Wan2.1", (480, 832), 49, 21 * GIGA, 4),
        ("Wan2.2", (704, 1280), 121, 21 * GIGA, 5),
        ("Wan2.2", (704, 1280), 121, 16 * GIGA, 3),
    ],
)
def test_a_chunk_is_what_fits_and_wastes_least(
    version: str, size: tuple[int, int], frames: int, room: int, expected: int
) -> None:
    sizes = FULL[version]
    geometry = Geometry(*size, frames, sizes.spatial_stride)
    assert choose_chunk(sizes, geometry, "bf16", "decode", room) == expected


def test_decoding_takes_the_operations_that_were_counted() -> None:
    """274 TFLOP for 81 frames of 480x832 by an independent count of the convolutions."""
    found = decoding_flops(FULL["Wan2.1"], Geometry(480, 832, 81)) / 1e12
    assert 270 < found < 278
    large, small = (
        needed_bytes(FULL["Wan2.1"], Geometry(480, 832, 81), dtype, "decode", 4)
        for dtype in ("fp32", "bf16")
    )
    assert large == 2 * small


SCRIPT = """
import hashlib, sys
import numpy as np
from pathlib import Path
from wanexport.runtime.load import load
from wanexport.runtime.parts.open import Parts
denoiser = load(sys.argv[1])
vae = Parts(Path(sys.argv[1]), None, denoiser.record, denoiser.device, {}).vae()
latent = np.random.default_rng(0).standard_normal((1, 16, 4, 8, 12), dtype=np.float32)
session = vae.session()
frames = [session.decode(latent[:, :, i : i + 1]) for i in range(4)] + [session.finish()]
loaded = {"diffusers", "transformers", "torch._inductor"} & sys.modules.keys()
for array in (vae.decode(latent), np.concatenate(frames)):
    print(hashlib.md5(array.tobytes()).hexdigest())
print(sorted(loaded))
"""


@pytest.mark.slow
def test_packages_decode_and_encode_as_the_checkpoints_vae(tmp_path: Path, vae: Path) -> None:
    """Built and proven; in processes of their own they give the same to the bit."""
    bundle = tmp_path / "built"
    record = build(
        "tiny", random_weights=0, resolution="64x96", frames=9, backends=["onnx"], device="cpu",
        vae=vae, vae_chunk=2, output=bundle,
    )  # fmt: skip
    (_, engine) = record["engines"]
    assert engine["proof"]["error"] < 1e-5 and engine["proof"]["encode_error"] < 1e-5
    assert not any(engine["lint"].values())
    import sys

    command = [sys.executable, "-c", SCRIPT, str(bundle)]
    said = [run_command(command).output.split("\n")[:3] for _ in range(2)]
    assert said[0] == said[1] and said[0][0] == said[0][1] and said[0][2] == "[]"
    denoiser = load(bundle)
    own, eager = Parts(bundle, None, denoiser.record, "cpu", {}).vae(), open_vae(vae)
    rng = np.random.default_rng(1)
    latent = rng.standard_normal((1, 16, 4, 8, 12), dtype=np.float32)
    off = np.abs(own.decode(latent).astype(int) - eager.decode(latent))
    assert off.max() <= 1 and off.mean() < 1e-3
    video = rng.uniform(-1, 1, (3, 9, 64, 96)).astype(np.float32)
    np.testing.assert_allclose(own.encode(video), eager.encode(video), atol=1e-5, rtol=0)
    shutil.rmtree(bundle)
