"""Causal engines in ONNX: Self-Forcing's rules, a cache in one place, and what a proof sees."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from onnxscript import opset23 as op

from tests.causal_stream import CONFIG, SIDES, Clip, Slots, compared
from tests.quick import slow_but
from wanexport.exporter.backends.onnx import cached
from wanexport.exporter.backends.onnx import lower as to_onnx
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import (
    Lowered,
    Lowering,
    for_onnx_runtime,
    for_tensorrt,
    lower,
)
from wanexport.exporter.backends.onnx.proof_process import OnnxJob, prove_onnx
from wanexport.exporter.backends.onnx.same import compare_graphs
from wanexport.exporter.build import build
from wanexport.exporter.inspection import inspect
from wanexport.exporter.lint.onnx import lint
from wanexport.exporter.reference.figures import make_case
from wanexport.exporter.reference.parity import FP32_GATE, relative_l2
from wanexport.graphs.causal import CausalAttention, CausalWan
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime import BadRequest, Geometry, WanExportError, load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.engines.onnx import OnnxEngine
from wanexport.runtime.engines.onnx_gpu import open_engines
from wanexport.runtime.engines.onnx_moments import WRITTEN
from wanexport.runtime.engines.onnx_providers import Provider
from wanexport.runtime.family import family_of
from wanexport.runtime.machine.memory import peak_rss
from wanexport.runtime.wan_config import WanConfig

GEOMETRY = Clip([3] * 2, 7).geometry
CLIPS = {
    "everything": Clip([3] * 2, 7),
    "a window and a sink that chunks do not divide": Clip([3] * 4, 7, window=7, sink=1),
    "chunks of several lengths": Clip([1, 3, 2], 7, window=7),
}
FP32, LENGTHS = for_onnx_runtime("fp32", "native"), for_onnx_runtime("fp32", "mha")
MASKED = replace(FP32, cached="mask")
PLANS = [for_tensorrt("fp32", attention) for attention in ("native", "decomposed")]
GRAPH = family_of(CONFIG).graph


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the small model in fp32."""
    path = tmp_path_factory.mktemp("weights") / "denoiser.safetensors"
    write_weights(path, CONFIG, "fp32", RandomWeights(CONFIG, 0, ""))
    return path


def graphs_of(lowered: Lowered, dtype: str = "fp32") -> dict[str, onnx.ModelProto]:
    """The graph of each moment by name."""
    _, layout = weights_layout(CONFIG, dtype)
    return {
        call.name: ir.to_proto(assemble(lowered, layout, call.when))
        for call in lowered.program.whole().calls
    }


def engine_of(folder: Path, weights: Path, geometry: Geometry, how: Lowering = FP32) -> OnnxEngine:
    lowered = lower(GRAPH, CONFIG, geometry, how)
    files = {}
    for name, model in graphs_of(lowered, how.dtype).items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        files[name] = pin(folder / f"{name}.onnx")
    return OnnxEngine(files, pin(weights), lowered.program.whole())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> OnnxEngine:
    return engine_of(tmp_path_factory.mktemp("engine"), weights, GEOMETRY)


def session(engine: OnnxEngine) -> Callable[..., Any]:
    """A video of the engine that has not begun."""
    memory = engine.memory()
    return lambda inputs, moment: engine(inputs, memory=memory, moment=moment)


def worst(clip: Clip, weights: Path, engine: OnnxEngine) -> float:
    pairs = compared(clip, load_arrays(weights), session(engine))
    return max(relative_l2(*pair) for pair in pairs)


@pytest.mark.parametrize("name", CLIPS)
def test_every_step_is_that_of_the_official_rules(
    name: str, weights: Path, engine: OnnxEngine
) -> None:
    assert worst(CLIPS[name], weights, engine) <= FP32_GATE


@pytest.mark.slow
@pytest.mark.parametrize("how", [LENGTHS, MASKED, *PLANS], ids=["lengths", "mask", "rows", "parts"])
def test_other_ways_to_attend_give_the_same(how: Lowering, weights: Path, tmp_path: Path) -> None:
    """Those of a GPU's engine and of TensorRT's graph, on the CPU."""
    other = engine_of(tmp_path, weights, GEOMETRY, how)
    assert worst(CLIPS["a window and a sink that chunks do not divide"], weights, other) <= 1e-5


def drawn(geometry: Geometry, seed: int = 0, config: WanConfig = CONFIG) -> dict[str, np.ndarray]:
    """The inputs of the first chunk of a video."""
    rng = np.random.default_rng(seed)
    specs = family_of(config).program(config, geometry).inputs
    inputs = {n: rng.standard_normal(s.shape, np.float32) for n, s in specs.items()}
    return inputs | {"timestep": np.full(geometry.chunk, 700, np.float32)} | place(geometry, 0)


def place(geometry: Geometry, number: int) -> dict[str, np.ndarray]:
    slots = Slots(geometry)
    for before in range(number):
        slots.place(before * geometry.chunk, geometry.chunk)
    return slots.place(number * geometry.chunk, geometry.chunk)


def test_every_moment_leaves_the_state_that_eager_leaves(weights: Path, engine: OnnxEngine) -> None:
    graph = CausalWan(CONFIG, GEOMETRY, torch.float32)
    graph.load_state_dict({n: torch.from_numpy(w) for n, w in load_arrays(weights).items()})
    state = {n: torch.zeros(s.shape) for n, s in graph.program.states().items()}
    memory, of_prompt = engine.memory(), dict[str, torch.Tensor]()
    for seed, moment in enumerate(["step", "step", "commit", "step"]):
        inputs = drawn(GEOMETRY, seed) | place(GEOMETRY, seed // 3)
        engine(inputs, memory=memory, moment=moment)
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            of_prompt = of_prompt or graph.run(given, state, ("prompt",))
            graph.run({**of_prompt, **given}, state, (moment,))
        for name, expected in state.items():
            assert relative_l2(memory.state[name], expected.numpy()) <= FP32_GATE, (moment, name)
            assert memory.state[name].any()


def test_the_text_is_read_once_and_the_cache_stays_where_it_is(engine: OnnxEngine) -> None:
    memory = engine.memory()
    before = dict(memory.state)
    first = engine(drawn(GEOMETRY), memory=memory)
    assert engine(drawn(GEOMETRY), memory=memory, moment="commit") is None
    cache = [name for name in before if name.startswith("cache_")]
    assert len(cache) == 2 * CONFIG.num_layers
    assert all(memory.state[name] is before[name] and before[name].any() for name in cache)
    other = drawn(GEOMETRY) | {"text": drawn(GEOMETRY, 5)["text"]}
    np.testing.assert_array_equal(engine(other, memory=memory), first)


def test_the_engine_of_a_gpu_binds_whole_numbers_and_keeps_its_cache(
    weights: Path, engine: OnnxEngine
) -> None:
    """On the CPU, where torch tensors are bound as they are on a GPU."""
    files = {"": pin(weights)}
    place = torch.device("cpu")
    opened = open_engines(engine.graphs, files, place, Provider("cpu"), engine.program)
    memory = opened[""].memory()
    before = {name: tensor.data_ptr() for name, tensor in memory.state.items()}

    def call(inputs: Mapping[str, np.ndarray], moment: str) -> Any:
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        velocity = opened[""](given, memory=memory, moment=moment)
        return None if velocity is None else velocity.numpy()

    pairs = compared(CLIPS["everything"], load_arrays(weights), call)
    assert max(relative_l2(*pair) for pair in pairs) <= FP32_GATE
    cache = [name for name in before if name.startswith("cache_")]
    assert all(memory.state[name].data_ptr() == before[name] for name in cache)
    with pytest.raises(BadRequest, match="tensorrt is not used for engines that keep a state"):
        open_engines(engine.graphs, files, place, Provider("tensorrt"), engine.program)


@pytest.mark.parametrize("moment", slow_but(["step", "commit"], "step"))
def test_nothing_of_a_caches_size_is_copied(moment: str, weights: Path, tmp_path: Path) -> None:
    """A cache that nobody has written takes no memory, and a copy of it would."""
    geometry = replace(GEOMETRY, height=64, width=96, cache=16_000)
    large = engine_of(tmp_path, weights, geometry)
    memory, inputs = large.memory(), drawn(geometry)
    size = memory.state["cache_k.0"].nbytes
    assert size > 60 << 20
    before = peak_rss()
    large(inputs, memory=memory, moment=moment)
    assert peak_rss() - before < size / 4


def flat(model: onnx.ModelProto) -> Counter[str]:
    nodes = onnx.inliner.inline_local_functions(model).graph.node
    return Counter(node.op_type for node in nodes)


def test_each_moment_has_the_nodes_that_it_needs() -> None:
    models = graphs_of(lower(GRAPH, CONFIG, GEOMETRY, FP32))
    counts = {name: flat(model) for name, model in models.items()}
    layers = CONFIG.num_layers
    assert set(counts) == {"prompt", "denoiser", "commit"}
    assert counts["denoiser"]["ScatterND"] == counts["commit"]["ScatterND"] == 2 * layers
    assert counts["denoiser"]["Attention"] == 2 * layers
    assert counts["commit"]["Attention"] == 2 * (layers - 1)
    assert not counts["prompt"]["ScatterND"] and not counts["prompt"]["Attention"]
    ends = {n: ({v.name for v in m.graph.input}, [v.name for v in m.graph.output])
            for n, m in models.items()}  # fmt: skip
    assert "text" in ends["prompt"][0] and "text" not in ends["denoiser"][0]
    assert not any(name.startswith("text_k.") for name in ends["prompt"][0])  # nothing reads it
    assert "keys" in ends["commit"][0] and "velocity" not in ends["commit"][1]
    written = [f"cache_{x}.{i}" for x in "kv" for i in range(layers)]
    assert ends["denoiser"][1] == ["velocity", *(f"{name}.next" for name in written)]
    for model in (models["denoiser"], models["commit"]):
        assert {p.key: p.value for p in model.metadata_props}[WRITTEN].split() == written
        assert [o.version for o in model.opset_import if not o.domain] == [23]


def test_a_graph_for_a_gpu_is_told_the_number_of_keys() -> None:
    model = graphs_of(lower(GRAPH, CONFIG, GEOMETRY, LENGTHS))["denoiser"]
    nodes = onnx.inliner.inline_local_functions(model).graph.node
    told = [n.input[6] for n in nodes if n.op_type == "Attention"]
    assert told == ["keys"] * CONFIG.num_layers
    assert [o.version for o in model.opset_import if not o.domain] == [24]


@pytest.mark.slow
def test_two_sizes_are_the_same_graphs_but_for_the_grid() -> None:
    small = Geometry(*SIDES, 21, chunk=3, cache=7)
    full = Geometry(64, 96, 81, chunk=3, cache=21)
    for how in (FP32, LENGTHS, MASKED, *PLANS):
        pairs = [graphs_of(lower(GRAPH, CONFIG, size, how)) for size in (full, small)]
        for name, model in pairs[0].items():
            other = pairs[1][name].SerializeToString()
            compare_graphs(model.SerializeToString(), other, (full, small))


def job_of(weights: Path, folder: Path) -> OnnxJob:
    """The proof of whatever the lowering makes."""
    files = {}
    for name, model in graphs_of(lower(GRAPH, CONFIG, GEOMETRY, FP32)).items():
        files[name] = str(folder / f"{name}.onnx")
        Path(files[name]).write_bytes(model.SerializeToString())
    names = {name: name for name in parameter_shapes(CONFIG)}
    case = make_case(CONFIG, GEOMETRY, "fp32", device="cpu", tensors=names, folder=folder)
    return OnnxJob(
        **case, weights=str(weights), engine=files, cut=files, runs_here=True, opens=True
    )


def one_slot_off(cache: Any, dim: int, index: Any, source: Any) -> Any:
    tokens = op.Constant(value_ints=[GEOMETRY.frame_tokens])
    return cached.write_rows(cache, dim, op.Add(index, tokens), source)


def all_slots(q: Any, k: Any, v: Any, keys: Any, kind: str) -> Any:
    everything = op.Constant(value_ints=[int(k.shape[1])])
    return cached.attend_prefix(q, k, v, everything, kind)


def unrotated(self: Any, x: torch.Tensor, chunk: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    still = chunk._replace(cos=torch.ones_like(chunk.cos), sin=torch.zeros_like(chunk.sin))
    KEEP(self, x, still, k, v)


KEEP = CausalAttention.keep
FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the valid length ignored": lambda p: p.setattr(to_onnx, "ATTEND", {"prefix": all_slots}),
    "one slot off": lambda p: p.setattr(to_onnx, "write_rows", one_slot_off),
    "keys kept before they are rotated": lambda p: p.setattr(CausalAttention, "keep", unrotated),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *FAULTS])
def test_a_proof_refuses_a_cache_that_is_used_wrong(
    name: str, weights: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if name:
            FAULTS[name](patch)
            patch.setattr(to_onnx, "_lint_translated", lambda *_: [])
        job = job_of(weights, tmp_path)
    if name:
        with pytest.raises(WanExportError, match="over the gate"):
            prove_onnx(job)
    else:
        assert prove_onnx(job)["error"] <= FP32_GATE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_built_engine_is_proven_clean_and_whole(dtype: str, tmp_path: Path) -> None:
    """bf16, which the CPU cannot run, by its own graphs in fp32."""
    built = build(
        "causal-tiny", random_weights=0, resolution="32x48", frames=81, chunk=3, cache=7,
        backends=["onnx"], device="cpu", dtype=dtype, output=tmp_path / "bundle",
    )  # fmt: skip
    (record,) = built["engines"]
    assert record["proof"]["error"] <= record["proof"]["gate"]
    (engine,) = read_manifest(tmp_path / "bundle").engines
    assert set(engine.files) == {"prompt", "denoiser", "commit"}
    assert engine.build["nodes"]["ScatterND"] == 2 * PRESETS["causal-tiny"].config.num_layers
    assert lint(tmp_path / "bundle")["clean"]
    assert not inspect(tmp_path / "bundle", verify=True)["problems"]
    if dtype != "bf16":
        (opened,) = load(tmp_path / "bundle").engines.values()
        assert isinstance(opened, OnnxEngine)
        velocity = opened(drawn(engine.geometry, config=PRESETS["causal-tiny"].config))
        assert np.isfinite(velocity).all() and velocity.dtype == np.float32
        kept = {array.dtype for array in opened.memory().state.values()}
        assert kept == {np.dtype(DTYPES[dtype].numpy)}


def test_a_session_that_began_in_inference_mode_goes_on_outside(
    weights: Path, engine: OnnxEngine
) -> None:
    """Of the engine of a GPU, on the CPU."""
    files, cpu = {"": pin(weights)}, torch.device("cpu")
    opened = open_engines(engine.graphs, files, cpu, Provider("cpu"), engine.program)[""]
    memory, given = opened.memory(), {n: torch.from_numpy(a) for n, a in drawn(GEOMETRY).items()}
    with torch.inference_mode():
        opened(given, memory=memory)
    for tensor in memory.state.values():
        tensor.zero_()
    assert not memory.state["text_k.0"].is_inference()
