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

from tests.causal_stream import CONFIG, Clip
from tests.exporter.backends.test_to_tensorrt import RTX, job_of, quietly
from tests.quick import slow_but
from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import Lowering, for_tensorrt, lower
from wanexport.exporter.backends.tensorrt.plan import build_plan, network_layers, parse
from wanexport.exporter.lint.tensorrt import lint_tensorrt
from wanexport.runtime import WanExportError
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.engines.tensorrt_library import import_tensorrt, message_log
from wanexport.runtime.family import family_of

GEOMETRY = Clip([3] * 2, 7).geometry
MASK = for_tensorrt("bf16", "native")
LENGTHS = replace(MASK, cached="lengths")


def graph_of(moment: str, how: Lowering = MASK) -> onnx.ModelProto:
    """A graph of the small model, its parameters inputs."""
    lowered = lower(family_of(CONFIG).graph, CONFIG, GEOMETRY, how)
    layout = weights_layout(CONFIG, "bf16")[1]
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
