"""Which call of an engine is at fault in the worst call of a comparison, and which node of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.bisect import Bisection, Forward, Noise, Row, Walker, over_gate
from wanexport.exporter.compare.diffusers_walk import DiffusersForward
from wanexport.exporter.compare.nodes import inside
from wanexport.exporter.compare.peers import Key, Peers
from wanexport.exporter.compare.rows import Rows, Worst
from wanexport.exporter.compare.sessions import Call
from wanexport.exporter.compare.steppers import EagerStepper, OnnxStepper, stepper_of
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.parity import FP32_NOISE
from wanexport.graphs.graph import torch_dtype
from wanexport.runtime.arrays import to_numpy
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.program import Program

Files = Mapping[str, PinnedFile]  # by expert


@dataclass(frozen=True)
class Sides:
    """An engine, what it is held against, and whose forward is the reference.

    weights are the files that the engine reads, and program has its calls.
    """

    engine: Denoiser
    program: Program
    weights: Files
    peers: Peers
    implementation: str

    def expert(self, call: Call) -> str:
        """The expert that serves a call."""
        return self.engine.expert(float(to_numpy(call.inputs["timestep"]).max()))

    def inputs(self, call: Call) -> dict[str, Tensor]:
        """What a call was given, in the shapes of the Program."""
        checked = self.engine.check(call.inputs, ())
        return {name: torch.from_numpy(to_numpy(value)) for name, value in checked.items()}


def check_sides(sides: Sides) -> None:
    """Raise BadRequest when a side has no values between its calls."""
    for expert in sides.engine.engines:
        stepper_of(sides.engine, sides.program, expert, sides.weights)
        _walker(sides, expert)


def locate(sides: Sides, compared: Rows, *, progress: Progress) -> dict[str, Any]:
    """Bisect the worst call of a comparison.

    Raises BadRequest when a side has no values between its calls, BundleError when the engine's
    graph is wired otherwise than the Program says.
    """
    worst = compared.worst
    call, expert = worst.call, sides.expert(worst.call)
    bisection = _bisection(sides, expert)
    walker, state = _walker(sides, expert), _state(sides, worst)
    rows = bisection.rows(walker, sides.inputs(call), state, progress)
    nodes = None
    if bisection.first is not None and isinstance(bisection.engine, OnnxStepper):
        progress("looking inside", 0, 0)
        exact = _eager(sides.peers.eager, "fp32", expert)
        nodes = inside(bisection.engine, exact, bisection.first)
    return {
        "step": worst.step,
        "timestep": float(to_numpy(call.inputs["timestep"]).max()),
        "expert": expert or None,
        "calls": rows,
        "first": None if bisection.first is None else bisection.first.place.name,
        "nodes": nodes,
        "verdict": verdict(rows, nodes, passed=compared.passed),
    }


def _bisection(sides: Sides, expert: str) -> Bisection:
    """The engine of one expert, and the models that tell what rounding does."""
    eager, other = sides.peers.eager, sides.peers.other
    engine = stepper_of(sides.engine, sides.program, expert, sides.weights)
    own = _noise(eager, sides.engine.record.dtype, expert)
    exact = _eager(eager, "fp32", expert)
    low = torch_dtype(sides.engine.record.dtype)
    if other is None:
        known = exact if sides.implementation == "graph" else None
        return Bisection(engine, own, low=low, known=known)
    there = sides.peers.of_other
    noises = [_noise(there, other.denoiser.record.dtype, expert)]
    if other.eager:
        noises += [Noise(exact, _eager(there, "fp32", expert))]
    others = [noise for noise in noises if noise is not None]
    return Bisection(engine, own, others, slack=FP32_NOISE, low=low)


def _noise(eager: Mapping[Key, Denoiser], dtype: str, expert: str) -> Noise | None:
    """What a precision does, None for fp32."""
    if dtype == "fp32":
        return None
    return Noise(_eager(eager, dtype, expert), _eager(eager, "fp32", expert))


def _eager(eager: Mapping[Key, Denoiser], dtype: str, expert: str) -> EagerStepper:
    engine = eager["graph", dtype].engines[expert]
    assert isinstance(engine, EagerEngine)
    return EagerStepper(engine)


def _walker(sides: Sides, expert: str) -> Walker:
    """The reference's forward, by an expert."""
    other = sides.peers.other
    if other is not None:
        return Forward(stepper_of(other.denoiser, sides.program, expert, other.weights))
    engine = sides.peers.eager[sides.implementation, "fp32"].engines[expert]
    if isinstance(engine, DiffusersEngine):
        return DiffusersForward(engine, sides.program)
    return Forward(_eager(sides.peers.eager, "fp32", expert))


def _state(sides: Sides, worst: Worst) -> dict[str, Tensor]:
    """The reference's state before the worst call: what the session's calls before it left."""
    state = {name: torch.zeros(spec.shape) for name, spec in sides.program.states().items()}
    for call in worst.before if state else ():
        _walker(sides, sides.expert(call)).walk(sides.inputs(call), state, lambda visited: None)
    return state


def verdict(rows: Sequence[Row], nodes: Mapping[str, Any] | None, *, passed: bool) -> str:
    """What was found, in a sentence or two."""
    first = next((row for row in rows if not row["passed"]), None)
    if first is None:
        nearest = max(rows, key=over_gate)
        near = f"the nearest is {nearest['call']}, at {over_gate(nearest):.2g} of its gate"
        whole = (
            "" if passed else "; the step fails, for smaller errors add up or grow in later calls"
        )
        return f"no call exceeds its floor: {near}{whole}"
    error = "NaN or Inf" if first["error"] is None else f"error {first['error']:.1e}"
    text = (
        f"{first['call']} is the first call that exceeds its floor: {first['value']} has {error}, "
        f"its gate is {first['gate'] or 0:.1e}"
    )
    if nodes is None:
        return text
    if (found := nodes["first"]) is None:
        return f"{text}; no value inside it exceeds its own: they differ from our graph's nowhere"
    of = f" of {', '.join(found['parameters'])}" if found["parameters"] else ""
    return (
        f"{text}; inside it {found['value']} is the first, by {', '.join(found['operators'])}{of}"
    )
