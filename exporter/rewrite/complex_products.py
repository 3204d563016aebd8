"""Products of complex numbers -> the four real products that they are made of.

`view_as_real(view_as_complex(x) * turns)` becomes a stack of `a*c - b*d` and `a*d + b*c`. PyTorch
computes just that where it works on whole vectors; what is left over at the end of a row it may
compute with one rounding less. So each product is tried at its own sizes before it is rewritten.
"""

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from wanexport.exporter.lint.program import place
from wanexport.exporter.rewrite.assemble import Write, assemble
from wanexport.exporter.rewrite.constants import Constants, erase_dead
from wanexport.exporter.rewrite.partition import Arrangement, Part
from wanexport.exporter.rewrite.record import COMPLEX_PRODUCTS, Left, Rewriting
from wanexport.exporter.rewrite.trial import product_is_exact
from wanexport.exporter.rewrite.writer import Writer, value_of

aten = torch.ops.aten
_CONJUGATES = (aten.conj.default, aten._conj.default, aten.conj_physical.default)
_Parts = tuple[Node, Node]


def rewrite_complex_products(program: ExportedProgram) -> Rewriting:
    """Rewrite every complex product that is read as real numbers, and the tables that it takes."""
    constants = Constants(program)
    parts: dict[Node, _Parts] = {}
    products = [node for node in program.graph.nodes if _is_product(node)]
    fired, left = 0, []
    for product in products:
        reason = _why_not(product, constants)
        if reason is None:
            _rewrite(product, parts, constants)
            fired += 1
        else:
            left.append(_left(product, reason))
    explained = {left.node for left in left}
    left += [
        _left(node, f"{next(iter(node.users)).target} takes it as complex")
        for node in program.graph.nodes
        if node.target is aten.view_as_complex.default and node.users
        and not any(user.name in explained for user in node.users)
    ]  # fmt: skip
    return Rewriting({COMPLEX_PRODUCTS: fired}, tuple(left))


def _left(node: Node, reason: str) -> Left:
    origin = place(node.meta.get("stack_trace") or "").removeprefix(" at ")
    return Left(COMPLEX_PRODUCTS, node.name, reason, origin)


def _is_complex(node: object) -> bool:
    value = value_of(node) if isinstance(node, Node) else None
    return value is not None and value.is_complex()


def _is_product(node: Node) -> bool:
    return node.target is aten.mul.Tensor and _is_complex(node)


def _why_not(product: Node, constants: Constants) -> str | None:
    if not all(map(_is_complex, product.args)):
        return "one of its factors is no complex tensor"
    for user in product.users:
        if user.target is not aten.view_as_real.default:
            return f"{user.name} takes the product as complex"
    if not product.users:
        return "nothing reads it"
    if constants.is_changed(product):
        return "it is changed in place"
    factors = [node for node in product.args if isinstance(node, Node)]
    first, second = map(value_of, factors)
    assert first is not None and second is not None
    for node, value in zip(factors, (first, second)):
        if value.is_conj() and constants.is_changed(node):
            return f"{node.name}, a conjugate, is changed in place"
    return product_is_exact(first, second)


def _rewrite(product: Node, parts: dict[Node, _Parts], constants: Constants) -> None:
    """Put the real product in the place of all that reads this one."""
    writer = Writer(product, product)
    factors = [node for node in product.args if isinstance(node, Node)]
    (a, b), (c, d) = (_parts_of(node, writer, parts, constants) for node in factors)
    call = writer.call
    mul, sub, add = aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor
    real = call(sub, call(mul, a, c), call(mul, b, d))
    imaginary = call(add, call(mul, a, d), call(mul, b, c))
    for user in list(product.users):
        pairs = value_of(user)
        assert pairs is not None
        axis = pairs.dim() - 1
        writes = [
            Write(product, value, axis, Part(i, i + 1, 1), is_select=True)
            for i, value in enumerate((real, imaginary))
        ]
        made = assemble(writer, pairs, writes, Arrangement((0, 1), is_stack=False))
        user.replace_all_uses_with(made)
        user.graph.erase_node(user)
    erase_dead(product, constants)


def _parts_of(
    node: Node, writer: Writer, parts: dict[Node, _Parts], constants: Constants
) -> _Parts:
    """The real and imaginary parts of a complex tensor: constants where it is one."""
    if node in parts:
        return parts[node]
    if (value := constants.value(node)) is not None:
        found = (constants.add(value.real, writer), constants.add(value.imag, writer))
    elif constants.is_changed(node, *node.all_input_nodes):
        found = _views(node, writer)
    elif node.target is aten.complex.default:
        found = (node.args[0], node.args[1])  # type: ignore[assignment]
    elif node.target in _CONJUGATES:
        real, imaginary = _parts_of(node.all_input_nodes[0], writer, parts, constants)
        found = (real, writer.call(aten.neg.default, imaginary))
    else:
        found = _views(node, writer)
    parts[node] = found
    return found


def _views(node: Node, writer: Writer) -> _Parts:
    """The parts as they lie in the memory of the complex tensor; of a conjugate, a copy's."""
    value = value_of(node)
    assert value is not None
    if value.is_conj():
        node = writer.call(aten.resolve_conj.default, node)
    is_view = node.target is aten.view_as_complex.default
    pairs = node.args[0] if is_view else writer.call(aten.view_as_real.default, node)
    select, last = aten.select.int, -1
    return writer.call(select, pairs, last, 0), writer.call(select, pairs, last, 1)
