"""What a graph must not contain, and where an exported program contains it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
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
_OPERATORS = {
    "host_sync": "item _local_scalar_dense equal is_nonzero",
    "strided_write": "slice_scatter select_scatter as_strided_scatter copy copy_ index_put "
    "index_put_ scatter scatter_",
    "sequence": "split split_with_sizes chunk tensor_split unbind",
    "einsum": "einsum",
    "unfused_attention": "softmax _softmax",
}
_KIND_OF = {f"aten.{name}": kind for kind, names in _OPERATORS.items() for name in names.split()}
_KIND_OF |= {"cond": "if", "while_loop": "loop", "scan": "loop"}
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


def lint_program(program: ExportedProgram) -> list[Finding]:
    """Everything in the program, branches of control flow included, that is one of KINDS."""
    findings = [
        Finding(kind, node.name, f"{node.target}{_place(node)}")
        for module in program.graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if node.op != "output"
        for kind in _kinds(node)
    ]
    signature = program.graph_signature
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    return findings + [
        Finding("mutation", node, f"writes {name}") for node, name in mutated.items()
    ]


def _kinds(node: Node) -> Iterator[str]:
    """The kinds of one node; a node may be of several."""
    name = str(node.target).removesuffix(f".{getattr(node.target, '_overloadname', '')}")
    if node.op == "call_function" and name in _KIND_OF:
        yield _KIND_OF[name]
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        yield "mutation"
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    yield from {_DTYPES[t.dtype] for t in tensors if t.dtype in _DTYPES}
    sizes = [size for t in tensors for size in t.shape]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        yield "dynamic_size"
    if any(free_unbacked_symbols(size) for size in sizes):  # a size read from a tensor's values
        yield "host_sync"


def _place(node: Node) -> str:
    """Where the node comes from in the source, if the program still knows."""
    frames = re.findall(r'File "(?:.*/)?([^"/]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""
