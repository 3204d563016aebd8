"""Tensors of a program that no input changes: their values, and new ones in their place."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg

from wanexport.exporter.rewrite.aliases import changed_roots, roots, written
from wanexport.exporter.rewrite.writer import Writer, is_random, specs_of

_MOST = 1 << 30  # bytes of a constant that is added
_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Constants:
    """The constants of a program, and what is computed of them alone."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._specs = specs_of(program)
        self._changed = changed_roots(program.graph)
        signature = program.graph_signature
        self._mutated = {*signature.buffers_to_mutate.values()}
        self._mutated |= {*signature.parameters_to_mutate.values()}
        self._values: dict[Node, Any] = {}
        self._added: dict[tuple[torch.dtype, torch.Size], list[tuple[Tensor, Node]]] = {}

    def is_changed(self, *nodes: Node) -> bool:
        """Whether the program writes one of the nodes in place."""
        return any(roots(node) & self._changed for node in nodes)

    def value(self, node: Node) -> Tensor | None:
        """The node's value; None when it is not the same in every run, or too large."""
        needed = self._needed(node)
        if needed is None:
            return None
        for one in needed:
            if one not in self._values:
                self._values[one] = self._evaluate(one)
        value = self._values[node]
        for one in needed:  # the views of a table are small, and what is made of it is not
            if one is not node and one.op != "placeholder":
                del self._values[one]
        is_small = isinstance(value, Tensor) and value.numel() * value.element_size() <= _MOST
        return value if is_small else None

    def _needed(self, node: Node) -> list[Node] | None:
        """What the node is computed of, in order; None when some of it is no constant."""
        found, pending = {node}, [node]
        while pending:
            current = pending.pop()
            if not self._is_constant(current):
                return None
            new = [n for n in current.all_input_nodes if n not in found]
            found.update(new)
            pending += new
        return [one for one in node.graph.nodes if one in found]

    def _is_constant(self, node: Node) -> bool:
        if node in self._changed:
            return False
        if node.op == "placeholder":
            tensor = self._stored(node)
            return tensor is not None and not isinstance(tensor, FakeTensor) and not tensor.is_meta
        if node.target is operator.getitem:
            return True
        target = node.target
        return (
            isinstance(target, torch._ops.OpOverload)
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
            and "empty" not in target.name()
        )

    def _stored(self, node: Node) -> Tensor | None:
        spec = self._specs.get(node.name)
        if spec is None or spec.kind not in _KINDS or spec.target in self._mutated:
            return None
        name = spec.target
        found = self.program.state_dict.get(name, self.program.constants.get(name))
        return found if isinstance(found, Tensor) else None

    def _evaluate(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._stored(node)
        args, kwargs = map_arg((node.args, node.kwargs), lambda one: self._values[one])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def add(self, tensor: Tensor, writer: Writer) -> Node:
        """The input that has this value: a new one unless there is one that was added."""
        tensor = tensor.detach().contiguous()
        same = self._added.setdefault((tensor.dtype, tensor.shape), [])
        for other, node in same:
            if torch.equal(other, tensor):
                return node
        node = self._new_input(tensor, writer)
        same.append((tensor, node))
        return node

    def _new_input(self, tensor: Tensor, writer: Writer) -> Node:
        graph, specs = self.program.graph, self.program.graph_signature.input_specs
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        place = next(
            (i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT), len(specs)
        )
        before = inputs[place] if place < len(inputs) else next(iter(graph.nodes))
        target = _free_name("real_table", {*self.program.constants, *self.program.state_dict})
        with graph.inserting_before(before):
            node = graph.placeholder(f"c_{target}")
        node.meta["val"] = _mode(inputs).from_tensor(tensor, static_shapes=True)
        argument = TensorArgument(name=node.name)
        specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, argument, target))
        self.program.constants[target] = tensor
        return node

    def forget(self, node: Node) -> None:
        """Take an input that nothing reads out of the program."""
        spec = self._specs.get(node.name)
        if spec is None or spec.kind not in _KINDS or node.users or node in self._changed:
            return
        if spec.target in self._mutated:
            return
        node.graph.erase_node(node)
        self.program.graph_signature.input_specs.remove(spec)
        self.program.constants.pop(spec.target, None)
        self.program.state_dict.pop(spec.target, None)


def erase_dead(last: Node, constants: Constants) -> None:
    """Erase a node that nothing uses, and those before it that only it used."""
    pending = [last]
    while pending:
        node = pending.pop()
        for user in list(node.users):  # what nobody uses, and what only checks a type
            if user.op == "call_function" and not (user.users or written(user) or is_random(user)):
                user.graph.erase_node(user)
        if node.users or node._erased:
            continue
        sources = node.all_input_nodes
        if node.op == "placeholder":
            constants.forget(node)
        elif not written(node) and not is_random(node):
            node.graph.erase_node(node)
            pending += sources


def _free_name(stem: str, taken: Iterable[str]) -> str:
    names = set(taken)
    number = 0
    while f"{stem}_{number}" in names:
        number += 1
    return f"{stem}_{number}"


def _mode(nodes: Iterable[Node]) -> Any:
    values = (node.meta.get("val") for node in nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))
