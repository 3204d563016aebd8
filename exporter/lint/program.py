"""What a graph must not contain, and where an exported program contains it."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

KINDS = (
    "host_sync",  # the host waits for a value, or for a size that depends on one
    "complex",
    "fp64",
    "strided_write",
    "sequence",  # a list of tensors, which TensorRT does not take
    "if",
    "loop",
    "einsum",
    "dynamic_size",
    "unfused_attention",  # a softmax of its own, or fewer attention operators than the model has
    "mutation",  # of a buffer or an input: the ONNX exporter drops it without a word
)
_KIND_OF = {
    "aten.item": "host_sync",
    "aten._local_scalar_dense": "host_sync",
    "aten.equal": "host_sync",
    "aten.is_nonzero": "host_sync",
    "aten.lift_fresh_copy": "host_sync",  # a tensor built from Python data
    "aten.einsum": "einsum",
    "aten.softmax": "unfused_attention",
    "aten._softmax": "unfused_attention",
    "aten.log_softmax": "unfused_attention",
    "aten._log_softmax": "unfused_attention",
    "cond": "if",
    "while_loop": "loop",
    "scan": "loop",
}
_STRIDED_WRITE = re.compile(
    r"aten\.(copy_?|(index_(put|copy|add|fill|reduce)|(masked_)?scatter(_add|_reduce)?|put)_?|"
    r"(slice|select|diagonal|as_strided)_scatter)"
)
_WRITES = ("mutation", "strided_write")  # what a program may do to its state
_ATTENTION = re.compile(r"wanexport\.(cached_)?attention|aten\._?scaled_dot_product_\w+")
_DTYPES = {
    torch.float64: "fp64",
    torch.complex32: "complex",
    torch.complex64: "complex",
    torch.complex128: "complex",
}


@dataclass(frozen=True)
class Finding:
    """One forbidden thing: its kind, the node that has it, and what it is."""

    kind: str
    node: str
    detail: str


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of every kind, zeros included."""
    counts = Counter(finding.kind for finding in findings)
    return {kind: counts[kind] for kind in KINDS}


def lint_program(
    program: ExportedProgram, attentions: int | None = None, writable: Collection[str] = ()
) -> list[Finding]:
    """Everything in the program, branches of control flow included, that is one of KINDS.

    attentions is how many attention operators the program must have; writable are the names of the
    inputs that it may write, its state.
    """
    findings = [
        Finding(kind, node.name, f"{node.target}{place(node.meta.get('stack_trace') or '')}")
        for node in _nodes(program)
        for kind in sorted(set(_kinds(node)))
        if kind not in _WRITES or _written(node).name not in writable
    ]
    signature = program.graph_signature
    mutated = {
        **signature.buffers_to_mutate,
        **signature.parameters_to_mutate,
        **signature.user_inputs_to_mutate,
    }
    findings += [
        Finding("mutation", node, f"writes {name}")
        for node, name in mutated.items()
        if name not in writable
    ]
    found = attention_operators(program)
    if attentions is not None and found != attentions:
        detail = f"{found} attention operators, the model has {attentions}"
        findings.append(Finding("unfused_attention", "", detail))
    return findings


def attention_operators(program: ExportedProgram) -> int:
    """How many attention operators the program has."""
    return sum(bool(_ATTENTION.match(operator_name(node))) for node in _nodes(program))


def _nodes(program: ExportedProgram) -> list[Node]:
    return [
        node
        for module in program.graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if node.op != "output"
    ]


def kinds_of_operator(name: str) -> Iterator[str]:
    """The kinds that an operator is of by its name, as `aten.copy_`."""
    if name in _KIND_OF:
        yield _KIND_OF[name]
    if _STRIDED_WRITE.fullmatch(name):
        yield "strided_write"


def place(stack_trace: str) -> str:
    """Where a node comes from in the source, if the program still knows."""
    frames = re.findall(r'File "(?:.*/)?([^"/]+)", line (\d+)', stack_trace)
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""


def operator_name(node: Node) -> str:
    """The operator without its overload, as aten.copy_."""
    return str(node.target).removesuffix(f".{getattr(node.target, '_overloadname', '')}")


def _kinds(node: Node) -> Iterator[str]:
    """The kinds of one node; a node may be of several."""
    name, schema = operator_name(node), getattr(node.target, "_schema", None)
    yield from kinds_of_operator(name)
    if schema is not None and any(str(r.type) == "List[Tensor]" for r in schema.returns):
        yield "sequence"
    if schema is not None and schema.is_mutable and _is_of_caller(node):
        yield "mutation"
    tensors = _tensors(node)
    yield from (_DTYPES[t.dtype] for t in tensors if t.dtype in _DTYPES)
    sizes = [size for t in tensors for size in t.shape]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        yield "dynamic_size"
    if any(free_unbacked_symbols(size) for size in sizes):  # a size read from a tensor's values
        yield "host_sync"
    given = {t.device.type for argument in node.all_input_nodes for t in _tensors(argument)}
    if given - {"cpu"} and any(t.device.type == "cpu" for t in tensors):
        yield "host_sync"


def _tensors(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _is_of_caller(node: Node) -> bool:
    """Whether an in-place operator writes a view of an input or a buffer, not of a temporary."""
    while node.op == "call_function":
        if not _is_view(node):
            return False
        node = node.all_input_nodes[0]
    return True


def _written(node: Node) -> Node:
    """What a write goes to: the tensor that its first operand is a view or a copy of."""
    root = node.all_input_nodes[0] if node.all_input_nodes else node
    while root.op == "call_function" and (_is_view(root) or operator_name(root) == "aten.clone"):
        root = root.all_input_nodes[0]
    return root


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    is_view = schema is None or any(r.alias_info for r in schema.returns)
    return is_view and bool(node.all_input_nodes)
