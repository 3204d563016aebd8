"""Both forms of the rotation in ONNX Runtime on a CPU: by themselves, and in a forward."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.tables.published.clock import Call, Times, in_turns, ratio
from tests.tables.published.rope_forms import RotateBoth
from tests.tables.published.wan import Size, denoiser, inputs, put

OPSET = 23
ONNX_ROWS = (
    "ScatterND nodes of two rotations",
    "ONNX Runtime, strided, ms",
    "ONNX Runtime, stack + flatten, ms",
    "ONNX Runtime, strided / stack + flatten",
    "forward in ONNX Runtime, strided, ms",
    "forward in ONNX Runtime, stack + flatten, ms",
    "forward in ONNX Runtime, strided / stack + flatten",
)


class _Rotation(nn.Module):
    """A form as a module, which is what is exported."""

    def __init__(self, form: RotateBoth) -> None:
        super().__init__()
        self.form = form

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.form(q, k, cos, sin)


class _Forward(nn.Module):
    """diffusers' model with the tensors of a call as arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        velocity: Tensor = self.model(noise, timestep, text, return_dict=False)[0]
        return velocity


def session(
    module: nn.Module, arguments: tuple[Tensor, ...], file: Path
) -> tuple[Any, Counter[str]]:
    """A session of an exported module with as many threads as PyTorch has, and its operators."""
    import onnxruntime

    program = torch.onnx.export(
        module, arguments, dynamo=True, opset_version=OPSET, optimize=True, verbose=False
    )
    assert program is not None
    program.save(str(file), external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    operators = Counter(node.op_type for node in program.model.graph.all_nodes())
    opened = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return opened, operators


def call(opened: Any, arguments: tuple[Tensor, ...]) -> Call:
    """A run of a session on these arguments."""
    names = [one.name for one in opened.get_inputs()]
    given = dict(zip(names, (one.numpy() for one in arguments), strict=True))
    return lambda: opened.run(None, given)


def timed(modules: Mapping[str, nn.Module], given: tuple[Tensor, ...], folder: Path) -> Any:
    """Times of each module in ONNX Runtime, and how many nodes of each operator it has."""
    arms, operators = {}, {}
    for name, module in modules.items():
        place = folder / name.replace(" ", "")
        place.mkdir()
        opened, operators[name] = session(module.eval(), given, place / "graph.onnx")
        arms[name] = call(opened, given)
    return in_turns(arms, "cpu"), operators


def onnx_cells(
    forms: Mapping[str, RotateBoth], size: Size, given: tuple[Tensor, ...], folder: Path
) -> Iterable[tuple[str, str]]:
    """Rows of both forms in ONNX Runtime."""
    (folder / "alone").mkdir(parents=True)
    modules: dict[str, nn.Module] = {name: _Rotation(form) for name, form in forms.items()}
    times, operators = timed(modules, given, folder / "alone")
    counts = (f"{name}: {found['ScatterND']}" for name, found in operators.items())
    yield "ScatterND nodes of two rotations", "; ".join(counts)
    yield from _rows("ONNX Runtime", times)
    (folder / "forward").mkdir()
    for name, form in forms.items():
        modules[name] = _Forward(put(denoiser(size, "cpu"), form))
    named = inputs(size, "cpu")
    tensors = tuple(named[n] for n in ("hidden_states", "encoder_hidden_states", "timestep"))
    times, _ = timed(modules, tensors, folder / "forward")
    yield from _rows("forward in ONNX Runtime", times)


def _rows(title: str, times: Mapping[str, Times]) -> Iterable[tuple[str, str]]:
    for name, one in times.items():
        yield f"{title}, {name}, ms", str(one)
    yield f"{title}, strided / stack + flatten", ratio(*times.values())
