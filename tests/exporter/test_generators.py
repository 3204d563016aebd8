"""A training's file holds a model and its average: which is read is chosen, kept and told."""

import io
import json
import shlex
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from tests.runtime.bundle.small_bundle import change, small_bundle
from wanexport.exporter import build as build_module
from wanexport.exporter.backends.order import BuildOptions
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.exporter.cli import display_bundle, main, terminal
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.compare.peers import generator_of, tensors_of_checkpoint
from wanexport.exporter.inspection import inspect, list_bundle
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.exporter.report.commands import compare_command
from wanexport.exporter.report.facts import facts_of_bundle
from wanexport.exporter.sets.add import add
from wanexport.exporter.sets.convert import add_weights
from wanexport.graphs.weights import read_tensor
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

BIAS = "head.head.bias"
EMA, RAW = "generator_ema", "generator"


def untold(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def trained(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A training's file, whose two models differ in one bias."""
    raw = {**state, BIAS: state[BIAS] + 1}
    torch.save({RAW: raw, EMA: dict(state)}, tmp_path / "wan.pt")
    return tmp_path / "wan.pt"


def put(bundle: Path, source: ModelSource) -> list[str]:
    """Make the base set of a bundle as `build` does, without an engine."""
    with open_bundle(bundle, build_module._empty_manifest(source)) as writer:
        reused = add_weights(writer, source, "", "fp32", untold)
        writer.commit()
    return reused


def content_of(state: dict[str, Tensor]) -> str:
    """The hash that tells two sources apart: of the hashes of all tensors' bytes, by name."""
    hashes = {name: sha256(t.numpy().tobytes()).hexdigest() for name, t in state.items()}
    return sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("ema", "first", "other"), [(None, EMA, False), (True, EMA, False), (False, RAW, None)]
)
def test_a_bundle_of_one_refuses_a_build_of_the_other(
    ema: bool | None,
    first: str,
    other: bool | None,
    trained: Path,
    state: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    assert put(bundle, resolve(str(trained), None, ema=ema)) == []
    record = read_manifest(bundle).weights["fp32"]
    assert record.source["generator"] == first
    bias = state[BIAS] + (first == RAW)
    np.testing.assert_array_equal(load_arrays(bundle / record.file.path)[BIAS], bias.numpy())
    assert record.content == content_of({**state, BIAS: bias})
    said = rf"holds other weights, of {first} of /.*wan\.pt: name another folder with -o"
    with pytest.raises(BadRequest, match=said):
        put(bundle, resolve(str(trained), None, ema=other))
    assert put(bundle, resolve(str(trained), None, ema=ema)) == ["weights fp32"]


def test_what_was_read_before_it_was_recorded_is_told_by_its_content(
    trained: Path, tmp_path: Path
) -> None:
    bundle, average = tmp_path / "bundle", resolve(str(trained), None)
    silent = {key: value for key, value in average.record.items() if key != "generator"}
    put(bundle, replace(average, record=silent))
    assert put(bundle, average) == ["weights fp32"]
    with pytest.raises(BadRequest, match=r"holds other weights, of /.*wan\.pt: name"):
        put(bundle, resolve(str(trained), None, ema=False))


def test_a_build_reads_what_it_was_asked_for(trained: Path) -> None:
    asked = BuildOptions("64x96", 9)
    for ema, read in ((None, EMA), (True, EMA), (False, RAW)):
        source = build_module._find_model(trained, replace(asked, ema=ema))
        assert source.record["generator"] == read


@pytest.fixture
def causal(config: WanConfig, tmp_path: Path) -> Path:
    """A bundle of the causal model, to which sets can be added."""
    shapes = [Geometry(64, 96, 9, chunk=3, cache=3)]
    own = replace(config, family="self-forcing")
    return small_bundle(tmp_path / "bundle", config=own, geometries=shapes)


def test_a_set_of_the_other_is_added_beside_and_shown(
    trained: Path, causal: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    added = {
        "average": add(causal, "average", model=trained),
        "raw": add(causal, "raw", model=trained, ema=False),
    }
    manifest = read_manifest(causal)
    for name, offset in (("average", 0), ("raw", 1)):
        arrays = load_arrays(causal / manifest.weights[f"{name}-fp32"].file.path)
        np.testing.assert_array_equal(arrays[BIAS], (state[BIAS] + offset).numpy())
    console = Console(file=(stream := io.StringIO()), soft_wrap=True, width=300)
    for module in (display_bundle, terminal):
        monkeypatch.setattr(module, "out", console)
    display_bundle.show_add(added["raw"])
    assert f", of {RAW}\n" in stream.getvalue()
    display_bundle.show_ls(list_bundle(causal))
    assert stream.getvalue().count(f", generator {EMA}") == 1
    display_bundle.show_inspect(inspect(causal))
    for read in (EMA, RAW):
        assert f", generator {read}\n" in stream.getvalue()
    rows = [row[-1] for row in facts_of_bundle(inspect(causal))["weights"]]
    assert f"{RAW} of {trained}" in rows and f"{EMA} of {trained}" in rows


def test_a_comparison_is_with_the_model_that_the_weights_were_read_from(
    trained: Path, causal: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    add(causal, "raw", model=trained, ema=False)
    manifest = read_manifest(causal)
    (engine,) = manifest.engines
    assert generator_of(manifest, engine, None) == ""  # zeros of nobody
    read = generator_of(manifest, engine, "raw")
    for ema in (None, True):
        with pytest.raises(BadRequest, match=r"read from generator, and -m reads generator_ema of"):
            tensors_of_checkpoint(trained, None, ema, manifest, read)
    tensors = tensors_of_checkpoint(trained, None, False, manifest, read)[""]
    torch.testing.assert_close(read_tensor(tensors[BIAS]), state[BIAS] + 1, atol=0, rtol=0)
    with pytest.raises(
        BadRequest, match=r"-m reads generator of .*: pass --ema, and -m a file with generator_ema$"
    ):
        tensors_of_checkpoint(trained, None, False, manifest, EMA)
    save_file(state, tmp_path / "wan.safetensors")  # which does not say what it is
    assert tensors_of_checkpoint(tmp_path / "wan.safetensors", None, None, manifest, read)


@pytest.mark.parametrize("stated", ["critic", "a\nb", 3, ["generator"], None])
def test_what_is_no_generator_decides_no_comparison(stated: Any, causal: Path) -> None:
    change(causal, "weights.fp32.source", {"path": "wan.pt", "generator": stated})
    manifest = read_manifest(causal)
    assert generator_of(manifest, manifest.engines[0], None) == ""
    change(causal, "weights.fp32.source", {"path": "wan.pt", "generator": RAW})
    manifest = read_manifest(causal)
    assert generator_of(manifest, manifest.engines[0], None) == RAW


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"hub": "a/b", "revision": "0"}, "a/b"),
        ({"hub": "a/b", "file": "c.pt", "generator": RAW}, f"{RAW} of a/b"),
        ({"preset": "tiny", "random_seed": 3}, "random weights of tiny, seed 3"),
    ],
)
def test_a_report_names_where_weights_are_from(
    source: dict[str, Any], said: str, causal: Path
) -> None:
    change(causal, "weights.fp32.source", source)
    assert [row[-1] for row in facts_of_bundle(inspect(causal))["weights"]] == [said]


@pytest.mark.parametrize(("ema", "option"), [(True, "--ema"), (False, "--no-ema")])
def test_where_there_is_no_file_there_is_no_choice(
    ema: bool, option: str, causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rf"^{option} is of a file that -m names: leave it out"
    monkeypatch.setattr("wanexport.exporter.model_source.download", None)
    for model, seed in ((None, None), ("tiny", 0)):
        with pytest.raises(BadRequest, match=said):
            resolve(model, seed, ema=ema)
    with pytest.raises(BadRequest, match=rf"^{option}: a/b has no generator.*, it holds one model"):
        resolve("a/b", None, ema=ema)  # not after a download
    with pytest.raises(BadRequest, match=said):
        add(causal, "raw", ema=ema)
    with pytest.raises(BadRequest, match=said):
        compare(causal, ema=ema)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("build", ["--resolution", "64x96", "--frames", "9"]),
        ("add", ["bundle", "raw"]),
        ("compare", ["bundle"]),
    ],
)
def test_commands_that_name_a_checkpoint_take_the_choice(command: str, words: list[str]) -> None:
    for option, ema in ([], None), (["--ema"], True), (["--no-ema"], False):
        given = main.cli.commands[command].make_context(command, [*words, *option]).params
        assert given["ema"] is ema


@pytest.mark.parametrize("ema", [None, True, False])
def test_the_command_below_a_comparison_repeats_the_choice(ema: bool | None, causal: Path) -> None:
    result: dict[str, Any] = {
        "reference": "graph", "model": "wan.pt", "low_noise": "low.pt", "ema": ema,
        "weights": None, "inputs": "seed 7", "bisect": None, "steps": [{"drift": 1e-6}],
    }  # fmt: skip
    command = compare_command("b", read_manifest(causal).engines[0], result)
    given = main.cli.commands["compare"].make_context("compare", shlex.split(command)[2:]).params
    assert (given["model"], given["low_noise"], given["ema"]) == ("wan.pt", "low.pt", ema)
