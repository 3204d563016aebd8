"""`compare --bisect`: which call of the Program is the first whose error exceeds its floor.

The reference's call is run call by call. Each call of the engine, a block say, is given what the
reference's was given: so what it gives tells of this call alone, and no error of an earlier one is
carried into it. The floor is what eager PyTorch makes of the same inputs in the engine's precision.
Beside it stand the values of an engine that follows its own: how the errors add up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from typing import Any, Protocol

import torch
from torch import Tensor

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.compare.steppers import Stepper, Values
from wanexport.exporter.reference.parity import Parity
from wanexport.runtime.errors import BundleError
from wanexport.runtime.program import ENGINE_DTYPE, Call, Program, TensorSpec, of_layer

_WIDE = TensorSpec(())
_PIECE = 1 << 22  # numbers that are compared at a time in fp64
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One layer of a call."""

    call: Call
    index: int

    @property
    def name(self) -> str:
        """What it is called: `embed`, `block 17`."""
        return f"{self.call.name} {self.index}" if self.call.repeat > 1 else self.call.name

    @property
    def state(self) -> tuple[str, ...]:
        """The names of the layer's state."""
        return of_layer(self.call.state, self.index)


@dataclass(frozen=True)
class Visited:
    """What the reference's call was given, its own state among it, and what it gave.

    `slack` is how far values of the reference are known to be off, by name.
    """

    place: Place
    given: Values
    written: Values
    slack: Mapping[str, float] = field(default_factory=dict)


class Walker(Protocol):
    """A reference: it runs a whole forward and shows each call of it."""

    def walk(
        self, inputs: Values, state: dict[str, Tensor], visit: Callable[[Visited], None]
    ) -> None:
        """Visit every call in order. The state is replaced by what it becomes."""


@dataclass(frozen=True)
class Forward:
    """A model whose calls run one at a time, as a reference."""

    stepper: Stepper

    def walk(
        self, inputs: Values, state: dict[str, Tensor], visit: Callable[[Visited], None]
    ) -> None:
        """Visit every call in order. The state is replaced by what it becomes."""
        known = dict(inputs)
        for place in places(self.stepper.program):
            given = _given(place, known, state)
            written = self.stepper.run_call(place.call, place.index, given)
            visit(Visited(place, given, written))
            _note(place, written, known, state)


@dataclass(frozen=True)
class Noise:
    """Two models whose difference is no fault of an engine, as eager PyTorch in two precisions."""

    rounded: Stepper
    exact: Stepper


@dataclass
class Bisection:
    """An engine, and what its calls may differ by from the reference's.

    `own` is the rounding of the engine's precision, None in fp32; `others` are those of a reference
    that is itself rounded, and `slack` what else it may be off by. A value that is kept in the
    precision `low` may be rounded once more than eager PyTorch does. `known` is the model whose
    calls are the reference's, which are not run twice. `first` is the first faulty call.
    """

    engine: Stepper
    own: Noise | None
    others: Sequence[Noise] = ()
    slack: float = 0.0
    low: torch.dtype = torch.float32
    known: Stepper | None = None
    first: Visited | None = None

    def rows(
        self, reference: Walker, inputs: Values, state: Mapping[str, Tensor], progress: Progress
    ) -> list[Row]:
        """A row for each call, in order; inputs and state are what the reference's call has."""
        rows: list[Row] = []
        carried = [_Chain(model, dict(inputs), dict(state)) for model in self._carried()]
        count = sum(1 for _ in places(self.engine.program))

        def visit(visited: Visited) -> None:
            progress("bisecting", len(rows), count)
            row = self._row(visited)
            if self.first is None and not row["passed"]:
                self.first = visited
            followed = [chain.follow(visited) for chain in carried]
            rows.append(row | _carried_figures(row["value"], followed, visited.written))

        reference.walk(inputs, dict(state), visit)
        return rows

    def _carried(self) -> list[Stepper]:
        models = [self.engine]
        if self.own is not None:
            models += [self.own.rounded]
            models += [] if self.own.exact == self.known else [self.own.exact]
        return models

    def _row(self, visited: Visited) -> Row:
        """The worst of the values that a call writes."""
        place = visited.place
        results = {} if self.known is None else {self.known: visited.written}

        def written(model: Stepper) -> Values:
            if model not in results:
                results[model] = model.run_call(place.call, place.index, visited.given)
            return results[model]

        found = written(self.engine)
        rows = [self._compared(name, found[name], visited, written) for name in visited.written]
        worst = max(rows, key=over_gate)
        return {"call": place.name, **worst}

    def _compared(
        self, name: str, value: Tensor, visited: Visited, written: Callable[[Stepper], Values]
    ) -> Row:
        right = visited.written[name]
        if value.shape != right.shape:
            raise BundleError(
                f"{visited.place.name} of the engine gives {name} {list(value.shape)}, the model "
                f"has {list(right.shape)}: run wanexport build again"
            )
        apart = [
            distance(written(noise.rounded)[name], written(noise.exact)[name])
            for noise in ([] if self.own is None else [self.own]) + [*self.others]
        ]
        own = None if self.own is None else apart.pop(0)
        others = [self.slack, visited.slack.get(name, 0.0), *apart]
        if self.engine.program.values.get(name, _WIDE).dtype == ENGINE_DTYPE:
            others.append(rounding(right, self.low))
        parity = Parity(distance(value, right), own, tuple(others))
        return {"value": name, **figures(parity)}


@dataclass
class _Chain:
    """A model that goes on from its own values."""

    model: Stepper
    known: dict[str, Tensor]
    state: dict[str, Tensor]

    def follow(self, visited: Visited) -> Values:
        """What the same call writes here."""
        place = visited.place
        given = _given(place, self.known, self.state)
        written = self.model.run_call(place.call, place.index, given)
        _note(place, written, self.known, self.state)
        return written


def places(program: Program) -> Iterator[Place]:
    """Every layer of every call, in order."""
    for call in program.calls:
        for index in range(call.repeat):
            yield Place(call, index)


def _given(place: Place, known: Values, state: Values) -> dict[str, Tensor]:
    reads = {name: known[name] for name in place.call.reads}
    return reads | {name: state[name] for name in place.state}


def _note(
    place: Place, written: Values, known: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    known.update({name: written[name] for name in place.call.writes})
    state.update({name: written[name] for name in place.state})


def _carried_figures(name: str, followed: Sequence[Values], right: Values) -> Row:
    """How far the engine is off by then, and eager PyTorch in its precision."""
    engine, *eager = (values[name] for values in followed)
    floor = None
    if eager:
        floor = distance(eager[0], eager[1] if len(eager) > 1 else right[name])
    return {"carried": number(distance(engine, right[name])), "carried_floor": number(floor)}


def distance(value: Tensor, right: Tensor) -> float:
    """|value - right| / |right| in fp64, a piece at a time; NaN when either has NaN or Inf."""
    a, b = (t.detach().reshape(-1).split(_PIECE) for t in (value, right.to(value.device)))
    pieces = [
        torch.stack([(x.double() - y.double()).square().sum(), y.double().square().sum()])
        for x, y in zip(a, b, strict=True)
    ]
    apart, norm = torch.stack(pieces).sum(0).sqrt().tolist()
    if not (isfinite(apart) and isfinite(norm)):
        return nan
    return apart / norm if norm else (inf if apart else 0.0)


def rounding(value: Tensor, dtype: torch.dtype) -> float:
    """How far a value is from itself, once it is rounded to a precision."""
    return distance(value.to(dtype).float(), value.float())


def figures(parity: Parity) -> Row:
    """The figures of one value, as JSON has them: null for NaN."""
    return {
        "error": number(parity.error),
        "floor": number(parity.floor),
        "gate": number(parity.gate),
        "passed": parity.passed,
    }


def number(value: float | None) -> float | None:
    """A figure as JSON has it: null for NaN and Inf."""
    return value if value is not None and isfinite(value) else None


def over_gate(row: Row) -> float:
    """error / gate; infinite where either is no number."""
    return inf if row["error"] is None or not row["gate"] else row["error"] / row["gate"]
