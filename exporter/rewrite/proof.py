"""A program before and after a rewrite, run on the same inputs."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from wanexport.exporter.rewrite.bits import differing
from wanexport.runtime.errors import BadRequest, WanExportError, first_line

_SEEDS = (0, 1)
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Proof:
    """What a program gives for its example inputs and for random ones, taken at construction.

    Raises BadRequest when it has no example inputs, or does not run on them.
    """

    def __init__(self, program: ExportedProgram) -> None:
        if program.example_inputs is None:
            raise BadRequest(
                "the program has no example inputs, so nothing can be compared: return "
                "(model, args), or a program that torch.export.export made here"
            )
        self._inputs = list(_variants(program.example_inputs))
        try:
            self._expected = [_run(program, inputs) for inputs in self._inputs]
        except Exception as error:
            raise BadRequest(f"the program does not run: {first_line(error)}") from error

    @property
    def runs(self) -> int:
        """How many inputs are compared."""
        return len(self._inputs)

    def check(self, program: ExportedProgram, rule: str) -> None:
        """Raise WanExportError when the program no longer gives the same bits."""
        for number, (inputs, expected) in enumerate(zip(self._inputs, self._expected)):
            if reason := differing(expected, _run(program, inputs)):
                which = f"random inputs of seed {_SEEDS[number - 1]}" if number else "its inputs"
                raise WanExportError(
                    f"the rule {rule} changes the values on {which}: {reason}; nothing is written"
                )


def _variants(example: _Inputs) -> Iterator[_Inputs]:
    """The example, then with all that is no integer replaced by noise of the same spread."""
    yield example
    for seed in _SEEDS:
        generator = torch.Generator().manual_seed(seed)
        yield pytree.tree_map_only(Tensor, partial(_noise, generator=generator), example)


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    if not (value.is_floating_point() or value.is_complex()):
        return value
    is_complex = value.is_complex()
    dtype = value.dtype.to_real() if is_complex else torch.float32
    parts = torch.randn(*value.shape, 1 + is_complex, generator=generator, dtype=dtype)
    noise = torch.view_as_complex(parts) if is_complex else parts[..., 0]
    wide = value if is_complex else value.double()
    spread = wide.abs().double().nan_to_num(1, 1, 1).square().mean().sqrt() if value.numel() else 0
    return (noise * (float(spread) or 1.0)).to(value)


def _run(program: ExportedProgram, inputs: _Inputs) -> Any:
    """Results, with what the run made of its inputs and buffers; the program's own stay."""
    args, kwargs = pytree.tree_map_only(Tensor, _copied, inputs)
    stored = {name: value.clone() for name, value in _state(program)}
    torch.manual_seed(0)
    with torch.no_grad():
        module = program.module()
        result = module(*args, **kwargs)
        written = {
            name: value.clone()
            for name, value in module.named_buffers()
            if name in stored and differing(stored[name], value)
        }
        for name, value in _state(program):
            value.copy_(stored[name])
    return result, args, kwargs, written


def _state(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """What a run may change: buffers, and tensors that are attributes of the model."""
    yield from program.named_buffers()
    for name, value in program.constants.items():
        if isinstance(value, Tensor) and value.numel():
            yield f"constant {name}", value


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.preserve_format)
