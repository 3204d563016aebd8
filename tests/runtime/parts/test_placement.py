"""Where encoders run on a GPU, by numbers alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.exporter.carried import carrying_bundle
from tests.runtime.bundle.small_bundle import CAUSAL, CONFIG, small_bundle
from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes, program_of
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.gpu_fit import activation_bytes
from wanexport.runtime.parts import open as open_module
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.placement import (
    Needs,
    encoder_bytes,
    needs_of,
    place_encoders,
    placement_note,
)

GB = 10**9
SMALL = Needs(3 * GB, GB, GB // 4, 13 * GB)  # the 1.3B at 480x832x81 with a VAE engine
LARGE = Needs(29 * GB, 3 * GB, GB // 4, 13 * GB)  # the 14B
TEXT, BOTH = {"text_encoder": 11 * GB}, {"text_encoder": 11 * GB, "image_encoder": GB}


@pytest.mark.parametrize(
    ("needs", "encoders", "free", "keeps_text", "may_precede", "expected"),
    [
        (SMALL, TEXT, 80, True, False, ["beside"]),
        (SMALL, TEXT, 80, False, False, ["before"]),
        (SMALL, TEXT, 29, True, False, ["beside"]),
        (SMALL, TEXT, 28, True, False, ["before"]),  # a decoding takes its place
        (SMALL, TEXT, 16, True, True, ["before"]),
        (SMALL, TEXT, 15, True, True, ["first"]),
        (SMALL, TEXT, 15, True, False, ["cpu"]),
        (SMALL, TEXT, 12, True, True, ["cpu"]),
        (LARGE, BOTH, 80, True, False, ["beside", "beside"]),
        (LARGE, BOTH, 55, True, False, ["beside", "before"]),
        (LARGE, BOTH, 45, True, False, ["before", "beside"]),
        (LARGE, BOTH, 43, True, False, ["before", "before"]),
        (LARGE, BOTH, 42, True, False, ["before", "cpu"]),  # both open at the same time
        (LARGE, BOTH, 32, True, False, ["cpu", "before"]),
        (LARGE, BOTH, 32, False, True, ["first", "before"]),
        (LARGE, BOTH, 24, False, True, ["first", "cpu"]),
        (LARGE, {}, 10, True, True, []),
    ],
)
def test_an_encoder_has_the_place_that_the_numbers_leave(
    needs: Needs,
    encoders: dict[str, int],
    free: int,
    keeps_text: bool,
    may_precede: bool,
    expected: list[str],
) -> None:
    placed = place_encoders(
        needs, encoders, free * GB, keeps_text=keeps_text, may_precede=may_precede
    )
    assert list(placed.values()) == expected


def test_what_does_not_stay_is_told_in_one_line() -> None:
    assert placement_note("text_encoder", "beside", GB, SMALL, 80 * GB) == ""
    told = placement_note("text_encoder", "cpu", 11 * GB, LARGE, 32 * GB)
    assert told == (
        "the text encoder (11.0 GB) runs on the CPU, which takes longer: the GPU has 32.0 GB free, "
        "of which the engine takes 32.0 and the VAE 13.2"
    )


def test_needs_follow_from_the_manifest(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", "onnx", "tensorrt")
    manifest = read_manifest(bundle)
    onnx, plan = manifest.engines
    (weights,) = manifest.weights.values()
    needs = needs_of(manifest, onnx, None)
    config = manifest.config
    program = program_of(config, onnx.geometry)
    call = activation_bytes(program, parameter_shapes(config), "fp32")
    assert needs == Needs(weights.file.size, call)
    stated = replace(plan, build={"activation_bytes": 1234})
    assert needs_of(manifest, stated, None).engine_call == 1234
    pair = replace(
        manifest,
        experts=("high_noise", "low_noise"),
        weights={e: replace(weights, expert=e) for e in ("high_noise", "low_noise")},
    )
    assert needs_of(pair, onnx, None).engine == 2 * weights.file.size
    assert needs_of(pair, onnx, None, offload="experts").engine == weights.file.size
    assert encoder_bytes(manifest, "text_encoder") == 11_361_820_672  # 5.68 billion in bf16


def test_of_streamed_blocks_what_is_on_the_gpu_counts(tmp_path: Path) -> None:
    """Two buffers, the blocks that stay, and what is in none, each tensor on 256 bytes."""
    bundle = small_bundle(tmp_path / "bundle", "aoti", config=replace(CONFIG, num_layers=6))
    manifest = read_manifest(bundle)
    (engine,), (weights,) = manifest.engines, manifest.weights.values()
    sizes = {
        name: -(-entry.size // 256) * 256
        for name, entry in read_header(bundle / weights.file.path).items()
    }
    layer = sum(size for name, size in sizes.items() if name.startswith("blocks.3."))
    rest = sum(sizes.values()) - 6 * layer
    call = needs_of(manifest, engine, None).engine_call
    for resident, held in ((None, 2), (0, 2), (1, 3), (4, 6), (6, 8)):
        needs = needs_of(manifest, engine, None, offload="blocks", resident_blocks=resident)
        stay = f"{held - 2} of 6 blocks stay"
        assert needs == Needs(rest + held * layer, call, blocks=stay)
    proven = replace(engine, proof={"peak_bytes": 1_000_000})
    assert needs_of(manifest, proven, None, offload="blocks").engine_call == 1_050_000


def test_of_a_causal_engine_the_cache_counts_before_and_after_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = Geometry(64, 96, 9, chunk=3, cache=3)
    bundle = small_bundle(tmp_path / "bundle", "aoti", config=CAUSAL, geometries=[geometry])
    manifest = read_manifest(bundle)
    (engine,), (weights,) = manifest.engines, manifest.weights.values()
    # Keys and values of 2 layers in fp32, 64 wide: 4 slots of 24 tokens, and 8 of the text.
    kept = 2 * 2 * (4 * 24 + 8) * 64 * 4
    needs = needs_of(manifest, engine, None)
    assert (needs.engine, needs.state) == (weights.file.size, kept)
    assert needs_of(manifest, engine, None, offload="blocks").state == kept
    assert f"{(needs.engine + kept + needs.engine_call) / 1e9:.1f} and" in placement_note(
        "text_encoder", "cpu", GB, needs, GB
    )
    size = encoder_bytes(manifest, "text_encoder")
    monkeypatch.setattr(open_module, "choose_vae_engine", lambda *_: None)
    for precedes, engine_bytes in ((True, needs.engine), (False, 0)):
        enough = engine_bytes + kept + needs.engine_call + (1 << 30) + size
        for free, place in ((enough, "beside"), (enough - 1, "before")):
            monkeypatch.setattr(open_module, "free_bytes", lambda device, free=free: free)
            parts = Parts(bundle, None, engine, "cuda:0", {})
            options = EngineOptions()
            parts.place(keeps_text=True, options=options, precedes=precedes, first=False)
            assert parts.placement == {"text_encoder": place}


def test_an_encoder_has_room_beside_streamed_blocks_of_the_14b() -> None:
    """28.9 GB of weights on a card of 24 GB; a block has 0.703 GB, and 0.8 are in none."""
    config, geometry = PRESETS["t2v-14b"].config, Geometry(480, 832, 81)
    file = SimpleNamespace(file=SimpleNamespace(size=28_900_000_000))
    manifest = cast(Any, SimpleNamespace(config=config, weights_of=lambda layout: [file]))
    engine = cast(
        Any,
        SimpleNamespace(
            layout="", dtype="bf16", geometry=geometry, program=program_of(config, geometry),
            proof={"peak_bytes": 2_900_000_000}, build={},
        ),
    )  # fmt: skip
    options: dict[str, Any] = {"keeps_text": True, "may_precede": False}
    whole = needs_of(manifest, engine, None)
    assert place_encoders(whole, TEXT, 24 * GB, **options) == {"text_encoder": "cpu"}
    needs = needs_of(manifest, engine, None, offload="blocks", resident_blocks=8)
    assert needs.engine == pytest.approx(0.85 * GB + 10 * 0.703 * GB, rel=0.02)
    assert place_encoders(needs, TEXT, 24 * GB, **options) == {"text_encoder": "beside"}
    assert place_encoders(needs, TEXT, 21 * GB, **options) == {"text_encoder": "before"}
    told = placement_note("text_encoder", "before", 11 * GB, needs, 21 * GB)
    assert "of which the engine takes 10.9 (8 of 40 blocks stay) and the VAE 0.0" in told


def test_an_encoder_that_the_engine_has_no_room_beside_opens_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = carrying_bundle(tmp_path)
    manifest = read_manifest(bundle)
    record, size = manifest.engines[0], encoder_bytes(manifest, "text_encoder")
    monkeypatch.setattr(open_module, "choose_vae_engine", lambda *_: None)
    needs, image = needs_of(manifest, record, None), encoder_bytes(manifest, "image_encoder")
    both = {"text_encoder", "image_encoder"}
    for free, keeps, later in (
        (needs.most + size + image, True, set()),
        (needs.most + size + image, False, set()),  # freed before a call, though there is room
        (needs.most + size + image - 1, False, {"text_encoder"}),
        (needs.most + min(size, image) - 1, True, both),
        (10**6, True, set()),  # on the CPU
    ):
        monkeypatch.setattr(open_module, "free_bytes", lambda device, free=free: free)
        parts = Parts(bundle, None, record, "cuda:0", {})
        parts.place(keeps_text=keeps, options=EngineOptions(), precedes=True, first=False)
        assert parts.later == later


def test_parts_are_placed_once_by_what_the_gpu_has_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = carrying_bundle(tmp_path)
    record = read_manifest(bundle).engines[0]
    asked: list[str] = []

    def free(device: str) -> int:
        asked.append(device)
        return 4 * GB

    monkeypatch.setattr(open_module, "free_bytes", free)
    monkeypatch.setattr(open_module, "choose_vae_engine", lambda *_: None)
    parts = Parts(bundle, None, record, "cuda:0", {})
    parts.place(keeps_text=True, options=EngineOptions(), precedes=False, first=False)
    assert parts.placement == {"text_encoder": "beside", "image_encoder": "beside"}
    assert asked == ["cuda:0"]
    monkeypatch.setattr(open_module, "free_bytes", lambda device: 10**6)
    small = Parts(bundle, None, record, "cuda:0", {})
    small.place(keeps_text=True, options=EngineOptions(), precedes=False, first=False)
    assert set(small.placement.values()) == {"cpu"}
    with pytest.warns(match=r"the text encoder \(0\.0 GB\) runs on the CPU"):
        small.text_encoder()  # on a machine without a GPU
    small.close()
