"""What TensorRT for RTX makes of a causal model's graphs, and of inputs that its parser drops."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnxscript import opset23 as op

from tests.causal_stream import CONFIG, Clip
from tests.exporter.backends.test_to_tensorrt import RTX, job_of, quietly, request_for
from tests.quick import slow_but
from wanexport.exporter.backends.backend import TensorRtOptions
from wanexport.exporter.backends.onnx import cached
from wanexport.exporter.backends.onnx import lower as to_onnx
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import Lowering, for_tensorrt, lower, serialize
from wanexport.exporter.backends.onnx.proof_process import OnnxJob, prove_onnx
from wanexport.exporter.backends.tensorrt import backend
from wanexport.exporter.backends.tensorrt.graphs import Graphs, lowered_graphs
from wanexport.exporter.backends.tensorrt.plan import PlanJob, build_plan, network_layers, parse
from wanexport.exporter.build import build
from wanexport.exporter.inspection import inspect
from wanexport.exporter.lint.tensorrt import lint_tensorrt
from wanexport.exporter.reference.figures import make_case
from wanexport.exporter.reference.parity import FP32_GATE
from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime import BadRequest, Geometry, WanExportError
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.engines.tensorrt_library import import_tensorrt, message_log
from wanexport.runtime.family import family_of

GEOMETRY = Clip([3] * 2, 7).geometry
MASK = for_tensorrt("bf16", "native")
LENGTHS = replace(MASK, cached="lengths")


def graph_of(moment: str, how: Lowering = MASK) -> onnx.ModelProto:
    """A graph of the small model, its parameters inputs."""
    lowered = lower(family_of(CONFIG).graph, CONFIG, GEOMETRY, how)
    layout = weights_layout(CONFIG, how.dtype)[1]
    return ir.to_proto(assemble(lowered, layout, moment, as_inputs=True))


def parsed(content: bytes) -> tuple[Any, list[dict[str, Any]]]:
    """The network of a graph, and its layers; with them what must outlive it."""
    trt = import_tensorrt(RTX)
    log = message_log(trt)
    builder = trt.Builder(log)
    return (log, builder), network_layers(parse(trt, builder, log, content))


@pytest.mark.parametrize("moment", slow_but(["prompt", "step", "commit"], "step"))
def test_every_moment_of_a_causal_model_builds(moment: str, tmp_path: Path) -> None:
    model = graph_of(moment)
    assert lint_tensorrt(model) == []
    result = build_plan(job_of(tmp_path, model.SerializeToString()), quietly)
    layers = CONFIG.num_layers
    attentions = {"prompt": 0, "step": 2 * layers, "commit": 2 * (layers - 1)}
    assert result["attention_layers"] == attentions[moment]


def test_attention_to_the_cache_is_given_a_mask_made_of_the_keys() -> None:
    _, layers = parsed(graph_of("step").SerializeToString())
    attentions = [layer for layer in layers if layer["type"] == "ATTENTION_INPUT"]
    counts = Counter(len(layer["inputs"]) for layer in attentions)
    assert counts == {4: CONFIG.num_layers, 3: CONFIG.num_layers}  # of the text there is no mask
    makers = {made[0]: layer for layer in layers for made in layer["outputs"]}
    dtypes = {made[0]: made[1] for layer in layers for made in layer["outputs"]}
    for layer in attentions:
        for mask in layer["inputs"][3:]:
            assert dtypes[mask] == "BOOL" and "keys" in sources(mask, makers)


def ends_of(moment: str) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """What the network of a moment takes beside parameters, what it gives, and its shape tensors:
    the latter would have to lie in the host's memory."""
    trt = import_tensorrt(RTX)
    log = message_log(trt)
    network = parse(trt, trt.Builder(log), log, graph_of(moment).SerializeToString())
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    given, made = (
        {end.name: (tuple(end.shape), end.dtype.name) for end in ends} for ends in (inputs, outputs)
    )
    of_shape = {end.name for end in (*inputs, *outputs) if end.is_shape_tensor}
    parameters = set(parameter_shapes(CONFIG))
    return {name: end for name, end in given.items() if name not in parameters}, made, of_shape


def test_each_moment_takes_the_state_that_it_reads_and_gives_what_of_it_is_new() -> None:
    layers, tokens, heads = CONFIG.num_layers, GEOMETRY.num_tokens, (2, 24)
    text = (1, CONFIG.text_len, *heads)
    cache, rows = ((1, n, *heads) for n in (GEOMETRY.slots * GEOMETRY.frame_tokens, tokens))
    step = {
        "latent": ((1, 16, 3, 4, 6), "FLOAT"),
        "timestep": ((3,), "FLOAT"),
        "position": ((1,), "INT64"),
        "slots": ((3,), "INT64"),
        "keys": ((1,), "INT64"),
    }

    def kept(name: str, shape: tuple[int, ...], count: int, ending: str = "") -> dict[str, Any]:
        return {f"{name}_{x}.{i}{ending}": (shape, "BF16") for x in "kv" for i in range(count)}

    new = kept("cache", rows, layers, ".rows")
    expected = {
        "prompt": (
            {"text": ((1, CONFIG.text_len, CONFIG.text_dim), "FLOAT")},
            kept("text", text, layers, ".next"),
        ),
        "step": (
            {**step, **kept("cache", cache, layers), **kept("text", text, layers)},
            {"velocity": step["latent"], **new},
        ),
        # Of the last layer only the keys and values are made.
        "commit": (
            {**step, **kept("cache", cache, layers - 1), **kept("text", text, layers - 1)},
            new,
        ),
    }
    for moment, ends in expected.items():
        assert ends_of(moment) == (*ends, set()), moment


def sources(name: str, makers: dict[str, dict[str, Any]]) -> set[str]:
    """All that a tensor is computed from."""
    found, left = set[str](), [name]
    while left:
        if (one := left.pop()) not in found:
            found.add(one)
            left += makers[one]["inputs"] if one in makers else []
    return found


@pytest.mark.slow
def test_a_network_that_drops_the_valid_length_is_refused(tmp_path: Path) -> None:
    """TensorRT's parser takes `nonpad_kv_seqlen` without a word, and attends to the whole cache."""
    content = graph_of("step", LENGTHS).SerializeToString()
    with pytest.raises(WanExportError, match="drops its input keys: no output") as refused:
        build_plan(job_of(tmp_path, content), quietly)
    assert "\n" not in str(refused.value) and not (tmp_path / "denoiser.plan").exists()


def proof_of(folder: Path, attention: str = "native") -> dict[str, Any]:
    """The proof of the graphs of plans, of whatever the lowering makes."""
    how, names = for_tensorrt("fp32", attention), parameter_shapes(CONFIG)
    lowered, files = lower(family_of(CONFIG).graph, CONFIG, GEOMETRY, how), {}
    _, layout = weights_layout(CONFIG, "fp32")
    for call in lowered.program.whole().calls:
        files[call.name] = str(folder / f"{call.name}.onnx")
        Path(files[call.name]).write_bytes(serialize(assemble(lowered, layout, call.when)))
    weights = folder / "denoiser.safetensors"
    write_weights(weights, CONFIG, "fp32", RandomWeights(CONFIG, 0, ""))
    same = {name: name for name in names}
    case = make_case(CONFIG, GEOMETRY, "fp32", device="cpu", tensors=same, folder=folder)
    job = OnnxJob(
        **case, weights=str(weights), engine=files, cut=files, runs_here=True, opens=False
    )
    return prove_onnx(job)


def one_slot_off(cache: Any, dim: int, index: Any, source: Any) -> Any:
    tokens = op.Constant(value_ints=[GEOMETRY.frame_tokens])
    return cached.write_rows(cache, dim, op.Add(index, tokens), source)


def all_slots(q: Any, k: Any, v: Any, keys: Any, kind: str) -> Any:
    everything = op.Constant(value_ints=[int(k.shape[1])])
    return cached.attend_masked(q, k, v, everything, kind)


def doubled_rows(result: ir.Value) -> ir.Value:
    """Others in the place of the new rows: their double."""
    scatter = result.producer()
    assert scatter is not None and scatter.inputs[2] is not None
    rows = scatter.inputs[2]
    doubled = ir.node("Add", [rows, rows])
    scatter.graph.insert_before(scatter, doubled)  # type: ignore[union-attr]
    doubled.outputs[0].shape, doubled.outputs[0].type = rows.shape, rows.type
    return doubled.outputs[0]


FAULTS: dict[str, tuple[str, Any]] = {
    "a chunk in other slots": ("write_rows", one_slot_off),
    "the valid length ignored": ("ATTEND", {"mask": all_slots}),
    "other rows given than those written": ("rows_of", doubled_rows),
}


@pytest.mark.parametrize(
    "name",
    [
        "other rows given than those written",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("", *list(FAULTS)[:-1])),
    ],
)
def test_the_proof_refuses_a_cache_that_is_used_wrong(name: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if name:
            patch.setattr(to_onnx, *FAULTS[name])
            patch.setattr(to_onnx, "_lint_translated", lambda *_: [])
            with pytest.raises(WanExportError, match="over the gate"):
                proof_of(tmp_path)
        else:
            for attention in ("native", "decomposed"):
                assert proof_of(tmp_path, attention)["error"] <= FP32_GATE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.filterwarnings("ignore:.* attention layers are fused")
def test_a_causal_engine_is_built_proven_and_inspected(dtype: str, tmp_path: Path) -> None:
    attention = "decomposed" if dtype == "fp32" else "native"
    options = TensorRtOptions(targets=("sm89",), allow_unfused=dtype == "fp32")
    built = build(
        "causal-tiny", random_weights=0, resolution="32x48", frames=81, chunk=3, cache=7,
        backends=[RTX], dtype=dtype, tensorrt=options, attention_operator=attention,
        output=tmp_path / "bundle",
    )  # fmt: skip
    (record,) = built["engines"]
    assert record["proof"]["error"] <= record["proof"]["gate"]
    assert "parsed and built by TensorRT for RTX" in record["proof"]["method"]
    (engine,) = read_manifest(tmp_path / "bundle").engines
    plans = {"prompt", "denoiser", "commit"}
    assert set(engine.files) == {*plans, "layers", "layers-prompt", "layers-commit"}
    layers = PRESETS["causal-tiny"].config.num_layers
    expected = 2 * layers + 2 * (layers - 1)
    assert engine.build["attention_expected"] == expected
    assert engine.build["attention_layers"] == (expected if attention == "native" else 0)
    assert set(engine.lint.values()) == {0} and "tensorrt" in engine.lint
    assert engine.program == engine.program.whole() and len(engine.program.calls) == 3
    assert not inspect(tmp_path / "bundle", verify=True)["problems"]


@pytest.mark.slow
def test_in_fp32_it_is_built_with_decomposed_attention(tmp_path: Path) -> None:
    """TensorRT for RTX has no kernel of attention with a mask in fp32."""
    parts = graph_of("step", for_tensorrt("fp32", "decomposed"))
    assert lint_tensorrt(parts) == []
    job = job_of(tmp_path, parts.SerializeToString(), dtype="fp32")
    assert build_plan(job, quietly)["attention_layers"] == 0
    native = graph_of("step", for_tensorrt("fp32", "native")).SerializeToString()
    with pytest.raises(WanExportError, match=r"attention is not fused: .* in fp32 at this size"):
        build_plan(job_of(tmp_path, native, dtype="fp32"), quietly)


@pytest.mark.slow
def test_full_width_layers_build_at_full_size(tmp_path: Path) -> None:
    """In less than the 3.9 GB that the scores of attention to the cache would take."""
    config = replace(PRESETS["self-forcing-1.3b"].config, num_layers=2)
    size, graph = Geometry(480, 832, 81, chunk=3, cache=21), family_of(config).graph
    graphs = lowered_graphs(graph, config, size, MASK, True)
    for name, attentions in {"prompt": 0, "denoiser": 4, "commit": 2}.items():
        result = build_plan(job_of(tmp_path, graphs.content[name], workspace=2**30), quietly)
        assert result["attention_layers"] == graphs.attentions[name] == attentions
        assert (tmp_path / "denoiser.plan").stat().st_size < 10_000_000


def test_baked_weights_are_refused_before_any_work() -> None:
    target = {"device": "cuda", "arch": "sm89", RTX: "1.7"}
    baked = TensorRtOptions(bake_weights=True)
    with pytest.raises(BadRequest, match="a self-forcing has a plan for each of its moments"):
        request_for(target, config=CONFIG, geometry=GEOMETRY, options=baked)


UNREAD = """
<ir_version: 11, opset_import: ["" : 24]>
small ({inputs}) => (float[1,2,4,64] y) {{ {nodes} }}
"""
Q, K = "float[1,2,4,64] q", "float[1,2,8,64] k"
PLANTED: dict[str, tuple[str, str, str]] = {
    "an operator's": (
        f"{Q}, {K}, int64[1] keys",
        "y = Attention(q, k, k, , , , keys)",
        "keys",
    ),
    "one that a cast stands before": (
        f"{Q}, {K}, int32[1] short",
        "keys = Cast<to = 7>(short)  y = Attention(q, k, k, , , , keys)",
        "short",
    ),
    "one that nothing takes": (f"{Q}, float[4] w", "y = Identity(q)", "w"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_an_input_that_reaches_no_output_is_refused(name: str) -> None:
    inputs, nodes, dropped = PLANTED[name]
    model = onnx.parser.parse_model(UNREAD.format(inputs=inputs, nodes=nodes))
    check: Callable[[bytes], Any] = parsed
    with pytest.raises(WanExportError, match=f"drops its input {dropped}: no output"):
        check(model.SerializeToString())


def test_each_of_several_plans_is_named_while_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = dict.fromkeys(("layers", "attention_layers", "seconds", "peak_rss_bytes"), 0)

    def run(job: PlanJob, scratch: Path, progress: Callable[[str, int, int], None]) -> Any:
        progress("building", 0, 1)
        return {**result, "attention_kernels": None, "activation_bytes": None}

    shown: list[str] = []
    monkeypatch.setattr(backend, "_run", run)
    monkeypatch.setattr(backend, "_take_over", lambda job, folder: None)
    request = request_for(
        {"device": "cuda", "arch": "sm89", RTX: "1.7"}, config=CONFIG, geometry=GEOMETRY
    )
    for moments in (("prompt", "denoiser", "commit"), ("denoiser",)):
        none = dict.fromkeys(moments, 0)
        monkeypatch.setattr(
            backend, "lowered_graphs", lambda *_, n=none: Graphs(dict.fromkeys(n, b""), n, {})
        )
        backend.TensorRtBackend(RTX).compile_engine(
            tmp_path, request, {}, lambda stage, *_: shown.append(stage)
        )
    label = request.label
    building = [f"{label}: {name}, building" for name in ("prompt", "denoiser", "commit")]
    lowering = f"{label}: tracing and lowering"
    assert shown == [lowering, *building, lowering, f"{label}: building"]
