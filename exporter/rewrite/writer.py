"""Nodes put into an exported program's graph, with the values that the exporter notes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg

_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


def value_of(node: Node) -> Tensor | None:
    """The tensor that the exporter noted for a node, which has a shape and no data."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


class Writer:
    """Adds calls before a node; they are said to come from where `origin` does."""

    def __init__(self, before: Node, origin: Node) -> None:
        self.before = before
        self.origin = origin

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of an operator, with its value. Raises what the operator does for bad shapes."""
        given = map_arg((args, kwargs), lambda node: node.meta["val"])
        with _mode_of(args):
            value = target(*given[0], **given[1])
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_function(target, args, kwargs)
        origin = self.origin.meta
        node.meta.update({key: origin[key] for key in _ORIGIN if key in origin})
        node.meta["val"] = value
        return node


def _mode_of(args: Any) -> Any:
    """The mode in which the tensors among the arguments have no data."""
    found: list[Any] = []
    map_arg(args, lambda node: found.append(node.meta["val"]))
    return next(value.fake_mode for value in found if isinstance(value, FakeTensor))


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers: without it the next one would draw others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags


def erase_unused(nodes: list[Node]) -> None:
    """Erase those of the nodes that nothing uses, later ones first."""
    for node in nodes:
        if not node.users and not is_random(node):
            node.graph.erase_node(node)


def finish(program: ExportedProgram) -> None:
    """Make the program's signature and code agree with its graph. Raises when it is not valid."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    for spec, node in zip(program.graph_signature.output_specs, output.args[0]):
        if isinstance(spec.arg, TensorArgument) and isinstance(node, Node):
            spec.arg = TensorArgument(name=node.name)
    program.graph.lint()
    program.graph_module.recompile()
    program.validate()


def specs_of(program: ExportedProgram) -> dict[str, InputSpec]:
    """Each input of the graph by its node's name, with what it stands for."""
    specs = program.graph_signature.input_specs
    return {spec.arg.name: spec for spec in specs if isinstance(spec.arg, TensorArgument)}
