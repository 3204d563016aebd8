"""How polygraphy runs the engines of each backend that it knows."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from wanexport.runtime.bundle.manifest import EngineRecord


class Runner(NamedTuple):
    """How polygraphy runs the engines of a backend, given engine and weights.

    Where it `names_weights`, the engine finds them in a file of the name that its graph has.
    """

    command: Callable[[EngineRecord, Path, Path], str]
    names_weights: bool


def _graph(record: EngineRecord, engine: Path, weights: Path) -> str:
    # Polygraphy names no folder of weights to ONNX Runtime, which refuses links to elsewhere;
    # with --external-data-dir it makes one message of all, which holds 2 GB at most.
    graph = weights.parent / engine.name
    provider = ["--providers", "cuda"] if record.target["device"] == "cuda" else []
    run = ["polygraphy", "run", str(graph), "--onnxrt", *provider]
    return f"{shlex.join(['cp', str(engine), str(graph)])} && {shlex.join(run)}"


def _plan(record: EngineRecord, engine: Path, weights: Path) -> str:
    run = ["polygraphy", "run", str(engine), "--trt", "--model-type", "engine"]
    return shlex.join(run)


def _plan_of_rtx(record: EngineRecord, engine: Path, weights: Path) -> str:
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {_plan(record, engine, weights)}"


RUNNERS = {
    "onnx": Runner(_graph, names_weights=True),
    "tensorrt": Runner(_plan, names_weights=False),
    "tensorrt-rtx": Runner(_plan_of_rtx, names_weights=False),
}
