"""A causal engine of AOTInductor on the CPU: its clips, its cache in place, and what it refuses."""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.causal_stream import Clip, compared, video_of
from wanexport.exporter.bench.bench import bench
from wanexport.exporter.build import build
from wanexport.exporter.cli.main import cli
from wanexport.exporter.reference.parity import FP32_GATE, relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.runtime import BadRequest, load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.drop_in.experts import EngineModule
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.program import ENGINE_DTYPE

CONFIG = PRESETS["causal-tiny"].config
CLIPS = {
    "everything": Clip([3] * 2, 7),
    "a window and a sink that chunks do not divide": Clip([3] * 4, 7, window=7, sink=1),
    "a first chunk of one frame": Clip([1, 3], 7, window=7),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of random weights at 32x48, in chunks of 3 with a cache of 7."""
    path = tmp_path_factory.mktemp("causal") / "bundle"
    build(
        "causal-tiny", random_weights=0, resolution="32x48", frames=81, chunk=3, cache=7,
        backends=["aoti"], device="cpu", dtype="fp32", output=path,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[AotiEngine]:
    opened = load(bundle).engines[""]
    assert isinstance(opened, AotiEngine)
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_every_step_is_that_of_the_official_rules(
    name: str, bundle: Path, engine: AotiEngine
) -> None:
    weights = load_arrays(bundle / "weights" / "fp32" / WEIGHTS_FILE)
    pairs = compared(CLIPS[name], weights, video_of(engine), config=CONFIG)
    assert max(relative_l2(*pair) for pair in pairs) <= FP32_GATE


@pytest.mark.slow
def test_two_sessions_do_not_meet(bundle: Path, engine: AotiEngine) -> None:
    weights, clip = load_arrays(bundle / "weights" / "fp32" / WEIGHTS_FILE), CLIPS["everything"]
    other = replace(clip, chunks=[1, 3, 3], window=7)
    others = compared(other, weights, video_of(engine), config=CONFIG)
    for pair in compared(clip, weights, video_of(engine), config=CONFIG):
        assert relative_l2(*pair) <= FP32_GATE and relative_l2(*next(others)) <= FP32_GATE


@pytest.mark.slow
def test_no_call_holds_a_second_cache(bundle: Path) -> None:
    """What the compiled calls allocate is far from as large as a layer's cache of either."""
    (engine,) = read_manifest(bundle).engines
    cache = prod(engine.program.state["cache_k.{i}"].shape)
    assert engine.program.state["cache_k.{i}"].dtype == ENGINE_DTYPE
    for name in ("block", "commit_keep"):
        sizes = allocated(bundle / engine.files[name].path)
        assert sizes and cache not in sizes, name


def allocated(package: Path) -> list[int]:
    """How many elements each tensor has that a package's code makes."""
    with zipfile.ZipFile(package) as archive:
        (file,) = (n for n in archive.namelist() if n.endswith(".wrapper.cpp"))
        code = archive.read(file).decode()
    arrays = re.findall(r"int64_t (int_array_\d+)\[\] = \{([^}]*)\}", code)
    sizes = {
        name: [int(n.strip("L ")) for n in text.split(",") if n.strip()] for name, text in arrays
    }
    return [prod(sizes[a]) for a in re.findall(r"empty_strided\(\d+, (int_array_\d+),", code)]


@pytest.mark.slow
def test_a_bundle_says_what_it_holds(bundle: Path) -> None:
    shown = CliRunner().invoke(cli, ["inspect", str(bundle), "--json"])
    (engine,) = json.loads(shown.output)["engines"]
    assert engine["name"].startswith("32x48x81-chunk3-cache7/aoti-fp32")
    assert engine["unusable"] == "" and engine["family"] == "self-forcing"
    assert not any(engine["lint"].values()) and engine["details"]["attention"]["cache"] == "sdpa"
    assert set(engine["files"]) == {"text", "text_block", "embed", "block", "head", "commit_keep"}


@pytest.mark.slow
def test_what_takes_whole_videos_refuses_a_causal_engine(bundle: Path) -> None:
    with pytest.raises(BadRequest, match=r"chunk by chunk, and bench .*: wanexport stream"):
        bench(bundle)
    with pytest.raises(BadRequest, match="chunk by chunk, and a pipeline"):
        EngineModule(load(bundle))
