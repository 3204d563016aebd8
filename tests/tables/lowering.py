"""What lowering a model to ONNX takes: seconds of CPU, peak memory, and the size of the graph.

python -m tests.tables.lowering [PRESET RESOLUTION FRAMES DTYPE]
"""

import sys
import time

from wanexport.exporter.backends.onnx.assemble import assemble
from wanexport.exporter.backends.onnx.lower import for_onnx_runtime, lower, node_counts, serialize
from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry, parse_resolution
from wanexport.runtime.machine.memory import peak_rss


def main(
    preset: str = "t2v-1.3b", resolution: str = "480x832", frames: str = "81", dtype: str = "fp32"
) -> None:
    """Print one line."""
    config = PRESETS[preset].config
    family = family_of(config)
    geometry = Geometry(*parse_resolution(resolution), int(frames), family.vae.spatial_stride)
    before, started = peak_rss(), time.process_time()
    lowered = lower(family.graph, config, geometry, for_onnx_runtime(dtype, "native"))
    content = serialize(assemble(lowered, weights_layout(config, dtype)[1]))
    seconds = time.process_time() - started
    print(
        f"{preset} {resolution}x{frames} {dtype}: {seconds:.1f} s of CPU, peak memory "
        f"{peak_rss() / 1e6:.0f} MB ({before / 1e6:.0f} before), {len(content) / 1e3:.0f} kB, "
        f"{sum(node_counts(lowered).values())} nodes a forward"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
