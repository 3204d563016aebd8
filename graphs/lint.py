"""What an exported graph must not contain, counted."""

from collections import Counter

import torch
from torch.export import ExportedProgram

_HOST_SYNCS = {"aten.item", "aten._local_scalar_dense"}
_STRIDED_WRITES = {
    "aten.slice_scatter",
    "aten.select_scatter",
    "aten.copy_",
    "aten.copy",
    "aten.index_put",
    "aten.index_put_",
    "aten.scatter",
}
_FORBIDDEN_DTYPES = {
    torch.float64: "fp64",
    torch.complex32: "complex",
    torch.complex64: "complex",
    torch.complex128: "complex",
}


def lint_program(program: ExportedProgram) -> dict[str, int]:
    """Count host syncs, complex and fp64 values, strided writes, dynamic sizes and mutations."""
    counts = Counter(
        dict.fromkeys(
            ("host_sync", "complex", "fp64", "strided_write", "dynamic_size", "mutation"), 0
        )
    )
    for node in program.graph.nodes:
        target = str(node.target).rsplit(".", 1)[0]
        counts["host_sync"] += target in _HOST_SYNCS
        counts["strided_write"] += target in _STRIDED_WRITES
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            if value.dtype in _FORBIDDEN_DTYPES:
                counts[_FORBIDDEN_DTYPES[value.dtype]] += 1
            counts["dynamic_size"] += any(not isinstance(size, int) for size in value.shape)
        schema = getattr(node.target, "_schema", None)
        counts["mutation"] += schema is not None and schema.is_mutable
    signature = program.graph_signature
    counts["mutation"] += len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate)
    return dict(counts)
