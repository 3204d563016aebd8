"""The key of an engine: another for all that decides its bytes, the same for what does not."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.exporter.families import camera
from tests.oracles.wan_reference import small_config, small_geometry
from wanexport.exporter import key
from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.table import BACKENDS
from wanexport.exporter.key import engine_key, sources
from wanexport.runtime.family import FAMILIES, family_of

GRAPH = "wanexport.graphs.wan"
ROOTS = {name: (*backend.SOURCES, GRAPH) for name, backend in BACKENDS.items()}
KINDS = ("onnx", "aoti", "tensorrt-rtx")
# What a person would name when asked what decides the bytes, found by reading.
DECIDING = {
    "onnx": "exporter.backends.onnx.lower exporter.backends.onnx.passes "
    "exporter.backends.onnx.assemble exporter.lint.onnx_graph",
    "aoti": "exporter.backends.aoti.compile exporter.backends.aoti.compiler "
    "exporter.backends.aoti.flash_attention exporter.backends.aoti.attention "
    "graphs.fused_block graphs.kernels runtime.engines.processor runtime.engines.flash_attention",
    "tensorrt-rtx": "exporter.backends.onnx.lower exporter.backends.onnx.passes "
    "exporter.backends.tensorrt.plan runtime.engines.tensorrt_library",
}
CAUSAL = "graphs.causal runtime.causal_wan runtime.engines.cached_kernels"
OF_ALL = "graphs.wan graphs.rope graphs.graph graphs.regions runtime.engines.operators"
UNDECIDING = (
    "runtime.errors runtime.family runtime.bundle.manifest runtime.bundle.durable runtime.load "
    "runtime.denoiser runtime.engines.choose runtime.serving.pipeline exporter.build "
    "exporter.cli.display exporter.child.child exporter.backends.onnx.prove "
    "exporter.reference.eager exporter.model_source"
)


def request_of(backend: str, **changes: Any) -> Request:
    """A resolved request of a small model, as a build on a CPU makes it."""
    config = small_config("t2v-1.3b")
    geometry = small_geometry(config)
    target = {
        "onnx": {"device": "cpu"},
        "aoti": {"device": "cpu", "arch": "x86_64", "torch": "2.13"},
        "tensorrt-rtx": {"device": "cuda", "arch": "sm89", "tensorrt-rtx": "1.7.1"},
    }[backend]
    sampling = family_of(config).sampling
    request = Request(config, geometry, sampling, backend, "bf16", "cpu", target)
    return BACKENDS[backend].resolve(replace(request, **changes))


@pytest.mark.parametrize("backend", KINDS)
def test_what_is_reached_by_import_is_what_a_reader_finds(backend: str) -> None:
    found = {name.removeprefix("wanexport.") for name in sources(ROOTS[backend])}
    assert {*DECIDING[backend].split(), *OF_ALL.split()} <= found
    assert not found & set(UNDECIDING.split())
    roots = (*BACKENDS[backend].SOURCES, FAMILIES["self-forcing"].graph.partition(":")[0])
    causal = {name.removeprefix("wanexport.") for name in sources(roots)}
    assert {*DECIDING[backend].split(), *OF_ALL.split(), *CAUSAL.split()} <= causal
    assert not causal & set(UNDECIDING.split())


def test_a_familys_own_graph_is_among_it() -> None:
    found = sources((*BACKENDS["onnx"].SOURCES, camera.__name__))
    assert {camera.__name__, GRAPH, "wanexport.graphs.graph"} <= set(found)


@pytest.mark.parametrize("backend", KINDS)
def test_every_file_that_is_touched_makes_another_key(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request = request_of(backend)
    files = sources(ROOTS[backend])
    before = engine_key(request)
    for name, path in files.items():
        copy = tmp_path / "touched.py"
        shutil.copy(path, copy)
        copy.write_text(copy.read_text() + "\n# touched\n")
        touched = {**files, name: copy}
        monkeypatch.setattr(key, "sources", lambda _, touched=touched: touched)
        assert engine_key(request) != before, name
    monkeypatch.setattr(key, "sources", lambda _: dict(files))
    assert engine_key(request) == before


@pytest.mark.parametrize("backend", KINDS)
def test_sampling_defaults_decide_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(backend)
    before = engine_key(request)
    family = FAMILIES["t2v"]
    other = replace(family.sampling, steps=7, shift=2.0)
    monkeypatch.setitem(FAMILIES, "t2v", replace(family, sampling=other, negative="", hub=""))
    assert engine_key(replace(request, sampling=other)) == before


def test_an_onnx_engines_device_decides_only_its_operator() -> None:
    on_cpu, on_gpu = request_of("onnx", device="cpu"), request_of("onnx", device="cuda:1")
    assert (on_cpu.attention, on_gpu.attention) == ("native", "mha")
    assert engine_key(on_cpu) != engine_key(on_gpu)
    named = request_of("onnx", device="cuda:1", attention="native")
    assert engine_key(named) == engine_key(on_cpu)


@pytest.mark.parametrize("backend", KINDS)
def test_what_is_ordered_decides(backend: str) -> None:
    request = request_of(backend)
    others = [
        replace(request, dtype="fp16"),
        replace(request, geometry=replace(request.geometry, frames=13)),
        *(replace(request, geometry=replace(request.geometry, chunk=3, cache=c)) for c in (7, 9)),
        replace(request, geometry=replace(request.geometry, chunk=2, cache=7)),
        replace(request, config=replace(request.config, num_layers=3)),
        replace(request, config=replace(request.config, family="t2v-a14b")),
        replace(request, attention="decomposed"),
        replace(request, baked={"": "0" * 64}),
    ]
    keys = {engine_key(other) for other in others}
    assert len(keys) == len(others) and engine_key(request) not in keys


def test_the_version_that_an_onnx_engine_is_proven_with_decides_nothing() -> None:
    request = request_of("onnx")
    others = [{"device": "cpu", "onnxruntime": number} for number in ("1", "2")]
    keys = {engine_key(replace(request, target=target)) for target in others}
    assert keys == {engine_key(request)}


def test_what_a_plan_is_bound_to_decides() -> None:
    request = request_of("tensorrt-rtx")
    changes = [{"arch": "sm120"}, {"tensorrt-rtx": "1.8"}, {"device": "cuda", "driver": "580"}]
    keys = [engine_key(replace(request, target={**request.target, **c})) for c in changes]
    assert len({*keys, engine_key(request)}) == 3 and keys[2] == engine_key(request)


def test_a_graph_elsewhere_is_read_with_what_it_imports() -> None:
    module = camera.FAMILY.graph.partition(":")[0]
    found = sources((*BACKENDS["onnx"].SOURCES, module))
    assert found[module] == Path(camera.__file__)
    assert {GRAPH, "wanexport.graphs.graph"} <= set(found)


RELATIVE = """
import os
def late():
    from .layers import deep
    from . import tables
    from wanexport.graphs import rope
"""


def test_imports_are_found_in_every_form_and_no_module_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "a_family"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "graph.py").write_text(RELATIVE + "raise RuntimeError('it was imported')")
    (package / "layers" / "__init__.py").write_text("from ..sizes import SIZE, OTHER")
    (package / "sizes.py").write_text("SIZE = OTHER = 1")  # to find what is in a package runs it
    for name in ("layers/deep", "tables", "unread"):
        (package / f"{name}.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    key._file.cache_clear()
    found = sources(["a_family.graph", "wanexport.graphs.signature"])
    own = {name for name in found if name.startswith("a_family")}
    parts = ("", ".graph", ".layers", ".layers.deep", ".tables", ".sizes")
    assert own == {f"a_family{name}" for name in parts}
    assert "wanexport.graphs.rope" in found


def test_the_name_of_the_weights_file_is_read() -> None:
    for backend in ("onnx", "tensorrt-rtx"):
        assert "wanexport.runtime.bundle.path" in sources(ROOTS[backend])


def test_a_compilers_version_and_inductors_settings_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    from wanexport.exporter.backends.aoti import compiler

    request = request_of("aoti")
    before = engine_key(request)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert engine_key(request) == before
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    settings = engine_key(request)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "another 1.0")
    assert len({before, settings, engine_key(request)}) == 3
