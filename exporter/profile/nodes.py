"""What ONNX Runtime's own profiler saw of a step, as events of PyTorch's trace.

PyTorch's profiler sees the session as one call. Both read the system's clock.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanexport.exporter.trace.chrome import Trace
from wanexport.exporter.trace.event import NODE, STEP
from wanexport.runtime.errors import EngineFailure


def add_nodes(trace: Trace, record: Path, began: int) -> int:
    """Add the nodes that ran within a trace's steps, and return how many they are.

    began is when the record began, in nanoseconds of the clock. Raises EngineFailure for a record
    that has none there.
    """
    shift = (began - int(trace.get("baseTimeNanoseconds", 0))) / 1e3
    marks = [raw for raw in trace["traceEvents"] if raw.get("name") == STEP]
    nodes = list(_nodes(json.loads(record.read_text()), shift, marks))
    if not nodes:
        raise EngineFailure("ONNX Runtime's profiler recorded no node in the steps: try again")
    trace["traceEvents"] += nodes
    return len(nodes)


def _nodes(
    record: list[dict[str, Any]], shift: float, marks: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for raw in record:
        if raw.get("cat") != "Node" or not raw["name"].endswith("_kernel_time"):
            continue
        start, args = raw["ts"] + shift, raw["args"]
        mark = next((m for m in marks if m["ts"] <= start <= m["ts"] + m["dur"]), None)
        if mark is not None:
            yield {
                "ph": "X",
                "cat": "cpu_op",
                "name": NODE + args["op_name"],
                "pid": mark["pid"],
                "tid": mark["tid"],  # it runs the session
                "ts": start,
                "dur": raw["dur"],
                "args": {
                    "Input shapes": args.get("input_type_shape", []),
                    "Output shapes": args.get("output_type_shape", []),
                    "node": raw["name"].removesuffix("_kernel_time"),
                },
            }
