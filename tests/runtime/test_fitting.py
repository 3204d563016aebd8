"""How `load` opens an engine on a GPU of which so much is free, without a GPU."""

import warnings
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.runtime.bundle.small_bundle import small_bundle
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.engines import device, device_weights
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import WanExportWarning
from wanexport.runtime.fitting import fit_options, needs_of, needs_of_engine
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import fitted as fitted_as_load

CONFIG, GEOMETRY = PRESETS["tiny"].config, Geometry(64, 96, 9)
MANIFEST = cast(Any, SimpleNamespace(experts=(), engines=()))
RECORD = cast(
    Any,
    SimpleNamespace(
        name="an engine", program=program_of(CONFIG, GEOMETRY), dtype="bf16", geometry=GEOMETRY,
        proof={"peak_bytes": 1_000_000}, target={"device": "cuda"},
    ),
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> PinnedFile:
    path = tmp_path / "denoiser.safetensors"
    write_weights(path, CONFIG, "bf16", RandomWeights(CONFIG, 0, ""))
    return pin(path)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a GPU is said to have free, and whether it has the weights already."""
    said: dict[str, Any] = {"free": 0, "resident": False}
    monkeypatch.setattr(device, "gpu_or_cpu", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(device, "room_on", lambda place: said["free"])
    monkeypatch.setattr(device_weights, "is_resident", lambda file, place: said["resident"])
    return said


def fitted(files: dict[str, PinnedFile], **options: Any) -> EngineOptions:
    return fit_options(MANIFEST, RECORD, files, EngineOptions(**options), "cuda")


def test_what_a_proof_measured_takes_the_place_of_the_estimate(file: PinnedFile) -> None:
    entries = read_header(file.path)
    needs = needs_of_engine(MANIFEST, RECORD, entries)
    assert (
        needs.activations
        == 1_050_000
        < needs_of(RECORD.program, entries, "bf16", GEOMETRY).activations
    )
    assert needs.rest + 4 * needs.layer >= sum(entry.size for entry in entries.values())


def test_a_causal_engines_cache_is_among_what_it_needs(file: PinnedFile) -> None:
    geometry = Geometry(64, 96, 9, chunk=3, cache=3)
    program = program_of(PRESETS["causal-tiny"].config, geometry)
    found = needs_of(program, read_header(file.path), "bf16", geometry).state
    assert found == sum(2 * prod(spec.shape) for spec in program.states().values()) > 0


def test_all_stays_where_it_fits_and_nothing_is_said(
    file: PinnedFile, room: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        room["free"] = 40 << 30
        assert fitted({"": file}) == EngineOptions()
        room.update(free=3 << 30, resident=True)  # another engine has them there
        assert fitted({"": file}) == EngineOptions()
        asked = EngineOptions(offload="blocks", resident_blocks=3)
        assert fitted({"": file}, offload="blocks", resident_blocks=3) == asked
        assert fitted({"": file}, offload="experts") == EngineOptions(offload="experts")


def test_blocks_are_streamed_where_not_all_fits_and_it_is_said(
    file: PinnedFile, room: dict[str, Any]
) -> None:
    needs = needs_of_engine(MANIFEST, RECORD, read_header(file.path))
    room["free"] = needs.rest + 3 * needs.layer + needs.activations
    with pytest.warns(WanExportWarning, match=r"1 of 4 blocks stay, the others.*--offload blocks"):
        found = fitted({"": file})
    assert (found.offload, found.resident_blocks) == ("blocks", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitted({"": file}, offload="blocks").resident_blocks == 1
        room["free"] = 0  # the opening says what lacks
        assert fitted({"": file}) == EngineOptions()
        assert fitted({"": file}, offload="blocks").resident_blocks == 0


def test_of_two_experts_one_stays_where_both_do_not_fit(
    file: PinnedFile, room: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.path.read_bytes())
    needs = needs_of_engine(MANIFEST, RECORD, read_header(file.path))
    room["free"] = needs.rest + 4 * needs.layer + max(needs.activations, needs.tiles)
    with pytest.warns(WanExportWarning, match="one expert stays at a time .--offload experts."):
        found = fitted({"high_noise": file, "low_noise": pin(other)})
    assert (found.offload, found.resident_blocks) == ("experts", None)
    assert fitted({"high_noise": file, "low_noise": file}).offload is None  # the same twice


def test_the_options_of_load_are_known_before_anything_is_opened(
    room: dict[str, Any], tmp_path: Path
) -> None:
    bundle = small_bundle(tmp_path, "aoti", "onnx")
    manifest = read_manifest(bundle)
    aoti, onnx = manifest.engines
    (weights,) = manifest.weights.values()
    needs = needs_of_engine(manifest, aoti, read_header(bundle / weights.file.path))
    room["free"] = needs.rest + needs.layers * needs.layer + needs.activations
    with pytest.warns(WanExportWarning, match="0 of 2 blocks stay"):
        found = fitted_as_load(bundle, aoti, "cuda", EngineOptions())
    assert found == EngineOptions(offload="blocks", resident_blocks=0)
    asked = EngineOptions(offload="blocks", resident_blocks=1)
    assert fitted_as_load(bundle, aoti, "cuda", asked) == asked
    for record, place in ((aoti, "cpu"), (onnx, "cuda")):  # which stream nothing
        assert fitted_as_load(bundle, record, place, EngineOptions()) == EngineOptions()
