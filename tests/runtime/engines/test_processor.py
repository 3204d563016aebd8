"""Machine code is compiled for a named level of instructions, has no others, and is checked."""

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.exporter.backends.machine_code import beyond, compiled_for
from wanexport.exporter.backends.aoti import compiler
from wanexport.exporter.backends.aoti.compiler import restrict_inductor
from wanexport.runtime.engines import aoti_target, processor
from wanexport.runtime.engines.processor import LEVELS, level_for, level_here, level_of, runs_here

V1, V2, V3, V4 = LEVELS["x86_64"].values()
# A region of the tiny model, compiled in a process of its own: argv is the level and the package.
COMPILE = """
import sys
from dataclasses import asdict
from wanexport.exporter.backends.aoti import compile as to_aoti
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Geometry
from wanexport.runtime.family import FAMILIES
level, path = sys.argv[1:]
if level:
    to_aoti.level_for = lambda device: level
config, geometry = asdict(PRESETS["tiny"].config), asdict(Geometry(64, 96, 9))
graph = FAMILIES["t2v"].graph
to_aoti.compile_region(to_aoti.RegionJob("head", graph, config, geometry, "fp32", "cpu", path))
"""


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (V1, "x86-64"),
        (f"{V1} {V2}", "x86-64-v2"),
        (f"{V1} {V2} {V3}", "x86-64-v3"),
        (f"{V1} {V2} {V3} {V4} amx_tile avx512_vnni", "x86-64-v4"),
        (f"{V1} {V2} {V3} avx512f avx512bw", "x86-64-v3"),  # not all of the next
        (f"{V1} {V2} {V4}", "x86-64-v2"),  # a machine that hides what lies between
        ("fpu", "x86-64"),
    ],
)
def test_the_level_is_the_highest_whose_instructions_are_all_there(flags: str, level: str) -> None:
    assert level_of(flags, "x86_64") == level


def test_other_machines_have_levels_of_their_own_or_none() -> None:
    assert level_of("fp asimd sve bf16", "aarch64") == "armv8-a"
    assert level_of(f"{V1} {V2}", "aarch64") == "armv8-a"
    assert level_of("fp asimd", "riscv64") == ""


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of x86-64-v2."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "level_here", lambda: "x86-64-v2")


def test_code_for_an_older_processor_runs_and_for_a_newer_does_not(old: None) -> None:
    assert [level for level in LEVELS["x86_64"] if runs_here(level)] == ["x86-64", "x86-64-v2"]
    assert not any(map(runs_here, ("native", "", "?", "armv8-a")))
    assert level_for("cpu") == level_for("cuda") == "x86-64-v2"


def test_a_gpus_engine_is_for_the_usual_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "level_here", lambda: "x86-64-v4")
    assert (level_for("cpu"), level_for("cuda")) == ("x86-64-v4", "x86-64-v3")


def test_an_engine_is_refused_for_instructions_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = {**aoti_target.versions("cpu"), "march": "x86-64-v3"}
    monkeypatch.setattr(platform, "machine", lambda: target["arch"])
    for here, mismatches in (
        ("x86-64-v4", []),
        ("x86-64-v3", []),
        ("x86-64-v2", ["march x86-64-v3, here x86-64-v2"]),
    ):
        for module in (processor, aoti_target):
            monkeypatch.setattr(module, "level_here", lambda here=here: here)
        assert aoti_target.mismatches(target) == mismatches
    del target["march"]
    assert aoti_target.mismatches(target) == ["march None, here x86-64-v2"]


def test_the_processor_that_inductor_states_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    for name in compiler._FEATURES:
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    flags = ["O3", "march=native", "DNDEBUG"]
    monkeypatch.setattr(cpp_builder, "_get_optimization_cflags", lambda *_: (flags, ["lto"]))
    restrict_inductor("x86-64-v3")
    assert cpp_builder._get_optimization_cflags("g++") == (
        ["O3", "DNDEBUG", "march=x86-64-v3"],
        ["lto"],
    )
    assert torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported()
    flags.remove("march=native")
    with pytest.raises(RuntimeError, match="states no processor"):
        cpp_builder._get_optimization_cflags("g++")


@pytest.mark.slow  # test_aoti has the same of the packages that it builds
@pytest.mark.skipif(level_here() < "x86-64-v3", reason="needs a processor of x86-64-v3")
@pytest.mark.parametrize("level", ["x86-64-v3", ""])
def test_a_package_has_no_instruction_beyond_its_level(level: str, tmp_path: Path) -> None:
    path = tmp_path / "head.pt2"
    subprocess.run([sys.executable, "-c", COMPILE, level, str(path)], check=True)
    assert not beyond(path, level or level_for("cpu"))
    assert compiled_for(path) == {level or level_for("cpu")}


def test_the_key_of_an_engine_has_compiler_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanexport.exporter.backends.backend import Request
    from wanexport.exporter.key import engine_key
    from wanexport.graphs.config import PRESETS, sampling_defaults
    from wanexport.runtime import Geometry

    config, geometry = PRESETS["tiny"].config, Geometry(64, 96, 9)
    sampling = sampling_defaults(config, (), geometry)
    target = {**aoti_target.versions("cpu"), "march": "x86-64-v3"}
    request = Request(config, geometry, sampling, "aoti", "fp32", "cpu", target)
    keys = {engine_key(request), engine_key(replace(request, target={**target, "march": "other"}))}
    other = tmp_path / "g++"
    other.write_text("#!/bin/sh\necho g++ of another version\n")
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert len(keys | {engine_key(request)}) == 3
