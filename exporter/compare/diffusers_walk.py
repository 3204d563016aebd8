"""diffusers' model as a reference that is bisected: hooks show what goes into its blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanexport.exporter.compare.bisect import Visited, distance, places
from wanexport.exporter.compare.steppers import Values
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.program import Program

_CALLS = ("embed", "block", "head")  # as which its modules count


@dataclass(frozen=True)
class DiffusersForward:
    """The forward of diffusers' model, its values by the names and in the shapes of a Program."""

    engine: DiffusersEngine
    program: Program

    def walk(
        self, inputs: Values, state: dict[str, Tensor], visit: Callable[[Visited], None]
    ) -> None:
        """Visit every call in order.

        Raises BadRequest for a Program that diffusers' modules do not make up.
        """
        if tuple(call.name for call in self.program.calls) != _CALLS:
            raise BadRequest(
                "diffusers' model has other calls than this one: bisect against --reference graph"
            )
        watch = _Watch(self.program, dict(inputs), visit)
        hooks = watch.attach(self.engine.model)
        try:
            watch.end(self.engine(inputs))
        finally:
            for hook in hooks:
                hook.remove()


class _Watch:
    """Collects what the modules give, and visits each call when its results are there."""

    def __init__(
        self, program: Program, known: dict[str, Tensor], visit: Callable[[Visited], None]
    ) -> None:
        self.program, self.known, self.visit = program, known, visit
        self.places = places(program)

    def attach(self, model: Any) -> list[Any]:
        """Hooks on the modules; they are to be removed."""
        self.embedded: dict[str, Tensor] = {}
        self.slack: dict[str, float] = {}
        return [
            model.condition_embedder.timesteps_proj.register_forward_hook(self._sinusoid),
            model.rope.register_forward_hook(self._rope),
            model.condition_embedder.register_forward_hook(self._condition),
            model.blocks[0].register_forward_pre_hook(self._embed),
            *(block.register_forward_hook(self._block) for block in model.blocks),
        ]

    def end(self, velocity: Tensor) -> None:
        """Visit the head, which gave the velocity."""
        self._see({"velocity": velocity})

    def _sinusoid(self, module: Any, given: tuple[Tensor, ...], features: Tensor) -> None:
        """Note how far the angles, which it computes in fp32, are off."""
        time, half = given[0].double(), features.shape[-1] // 2
        powers = torch.arange(half, dtype=torch.float64, device=time.device) / half
        angles = time[:, None] * 10000.0**-powers
        off = distance(features, torch.cat([angles.cos(), angles.sin()], dim=-1))
        self.slack = {"time": off, "modulation": off}

    def _rope(self, module: Any, given: Any, tables: tuple[Tensor, Tensor]) -> None:
        # Each angle stands there twice, for the two numbers that it turns.
        self.embedded |= {n: t[..., ::2] for n, t in zip(("cos", "sin"), tables, strict=True)}

    def _condition(self, module: Any, given: Any, results: tuple[Tensor | None, ...]) -> None:
        time, modulation, context, image = results
        named = {"time": time, "modulation": modulation, "context": context}
        self.embedded |= {name: value for name, value in named.items() if value is not None}
        if image is not None:
            self.embedded["image_context"] = image

    def _embed(self, module: Any, given: tuple[Any, ...]) -> None:
        self._see({**self.embedded, "x": given[0]})

    def _block(self, module: Any, given: Any, x: Tensor) -> None:
        self._see({"x": x})

    def _see(self, written: dict[str, Tensor]) -> None:
        place = next(self.places)
        shaped = {name: self._shaped(name, written[name]) for name in place.call.writes}
        given = {name: self.known[name] for name in place.call.reads}
        self.visit(Visited(place, given, shaped, self.slack))
        self.known |= shaped

    def _shaped(self, name: str, value: Tensor) -> Tensor:
        """A value as the Program has it; of equal rows for a frame's tokens, the first."""
        shape = {**self.program.values, **self.program.outputs}[name].shape
        rows = value.detach().float().reshape(-1, *shape[1:]) if shape[0] > 1 else value
        rows = rows[:: len(rows) // shape[0]] if name in ("time", "modulation") else rows
        return rows.float().reshape(shape)
