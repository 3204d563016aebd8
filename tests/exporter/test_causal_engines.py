"""Engines of one causal model that differ in chunk or cache: kept apart, shown, named again."""

import io
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from tests.runtime.bundle.small_bundle import CAUSAL, small_bundle
from wanexport.exporter.bench.bench import bench
from wanexport.exporter.bench.subject import choose_subject
from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.exporter.cli import display_bundle, terminal
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare.against import choose_other
from wanexport.exporter.inspection import inspect
from wanexport.exporter.report.commands import engine_words, profile_command
from wanexport.exporter.run.record import engine_in_full
from wanexport.exporter.run.request import RunRequest
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry

SIZES = [(3, 9), (3, 6), (1, 9)]  # chunk and cache
CHOICES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"cache": 6}, (3, 6)),
    ({"chunk": 1}, (1, 9)),
    ({"chunk": 3, "cache": 9}, (3, 9)),
]


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    """A bundle of six engines: three chunks and caches, each of two backends."""
    shapes = [Geometry(64, 96, 33, chunk=chunk, cache=cache) for chunk, cache in SIZES]
    return small_bundle(tmp_path / "bundle", "onnx", "aoti", config=CAUSAL, geometries=shapes)


def size_of(geometry: Geometry) -> tuple[int, int]:
    return geometry.chunk, geometry.cache


@pytest.mark.parametrize(("options", "size"), CHOICES)
def test_what_was_chosen_is_stated_for_every_arm(
    options: dict[str, Any], size: tuple[int, int], causal: Path
) -> None:
    subject = choose_subject(causal, EngineOptions(backend="onnx", **options), [])
    assert size_of(subject.record.geometry) == size
    assert (subject.options.chunk, subject.options.cache) == size


def test_without_a_choice_no_engine_is_measured(causal: Path) -> None:
    with pytest.raises(BadRequest, match=r"64x96x33-chunk1-cache9/.*: name chunk and cache$"):
        choose_subject(causal, EngineOptions(), [])


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 7}, {"arms": ["graph"]}])
def test_bench_refuses_a_causal_model_and_asks_for_nothing(
    options: dict[str, Any], causal: Path
) -> None:
    said = r"bundle is of a causal model.*: wanexport stream says how long the chunks take$"
    with pytest.raises(BadRequest, match=said) as refused:
        bench(causal, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", SIZES)
def test_the_other_engine_of_a_comparison_has_the_same_chunk_and_cache(
    size: tuple[int, int], causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanexport.runtime.engines.choose._refusal", lambda *_: "")
    manifest = read_manifest(causal)
    asked = EngineOptions(backend="onnx", device="cpu", chunk=size[0], cache=size[1])
    choice = choose_engine(causal, manifest, asked)
    other, _ = choose_other(causal, manifest, choice, "aoti", EngineOptions(device="cpu"))
    assert (other.record.backend, size_of(other.record.geometry)) == ("aoti", size)


@pytest.mark.parametrize(("options", "size"), CHOICES)
def test_a_record_names_the_engine_that_ran(
    options: dict[str, Any], size: tuple[int, int], causal: Path
) -> None:
    manifest = read_manifest(causal)
    asked = EngineOptions(backend="onnx", device="cpu", **options)
    record = choose_engine(causal, manifest, asked).record
    request = RunRequest(causal, Path("x.safetensors"), "a")
    ran = SimpleNamespace(
        record=record, geometry=record.geometry, device="cpu", offload=None, resident_blocks=None
    )
    full = engine_in_full(request, cast(Denoiser, ran))
    assert (full.chunk, full.cache) == size
    assert choose_engine(causal, manifest, full).record == record


@pytest.mark.parametrize("size", SIZES)
def test_commands_of_a_report_name_chunk_and_cache(size: tuple[int, int], causal: Path) -> None:
    engines = read_manifest(causal).engines
    (engine, _) = (e for e in engines if size_of(e.geometry) == size)
    saved = {"arm": "onnx", "size": engine.geometry.name, "dtype": "fp32", "weights": None}
    command = profile_command("b", {**saved, "steps": 3, "warmup": 2})
    for words in (["b", *engine_words(engine)], shlex.split(command)[2:]):
        given = cli.commands["profile"].make_context("profile", words).params
        assert (given["resolution"], given["frames"]) == ("64x96", 33)
        assert (given["chunk"], given["cache"]) == size


def test_inspect_shows_what_to_choose_by(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = inspect(causal)
    shown = [(e["geometry"]["chunk"], e["geometry"]["cache"]) for e in record["engines"]]
    assert not record["problems"] and set(shown) == set(SIZES)
    console = Console(file=(stream := io.StringIO()), soft_wrap=True, width=300)
    for module in (display_bundle, terminal):
        monkeypatch.setattr(module, "out", console)
    display_bundle.show_inspect(record)
    for chunk, cache in SIZES:
        assert stream.getvalue().count(f", chunk {chunk} and cache {cache} latent frames\n") == 2


def test_an_engine_of_another_chunk_or_cache_takes_no_place(causal: Path) -> None:
    manifest = read_manifest(causal)
    engines = {engine.name: engine for engine in manifest.engines}
    assert len(engines) == 6
    empty = Manifest("small", CAUSAL, (), {}, (), "0.1.0")
    with open_bundle(causal, empty) as writer:
        for engine in manifest.engines:
            writer.put_engine(engine)
        folders = {
            writer.free_folder(Path("engines") / Geometry(64, 96, 33, chunk=2, cache=cache).name)
            for cache in (6, 9)
        }
        writer.commit()
    assert {folder.name for folder in folders} == {
        "64x96x33-chunk2-cache6",
        "64x96x33-chunk2-cache9",
    }
    assert {engine.name: engine for engine in read_manifest(causal).engines} == engines


@pytest.mark.slow
def test_built_engines_lie_side_by_side_and_are_opened_by_name(tmp_path: Path) -> None:
    for chunk, cache in SIZES:
        built = build(
            "causal-tiny", random_weights=0, resolution="32x48", frames=33, chunk=chunk,
            cache=cache, backends=["onnx"], device="cpu", output=tmp_path,
        )  # fmt: skip
        assert [engine["name"] for engine in built["engines"]] == [
            f"32x48x33-chunk{chunk}-cache{cache}/onnx-fp32"
        ]
    assert len(read_manifest(tmp_path).engines) == 3
    assert inspect(tmp_path, verify=True)["problems"] == []
    with pytest.raises(BadRequest, match=r"several shapes .*: name chunk and cache$"):
        load(tmp_path)
    for options, size in CHOICES:
        denoiser = load(tmp_path, **options)
        assert size_of(denoiser.geometry) == size
        assert denoiser.inputs["latent"].shape[2] == size[0]
        denoiser.close()
