"""What forks of commands have imported: see `forked.py`."""

import gc
from importlib import import_module

from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.onnx_library import read_once
from tests.unsynced import spare_the_disk

for module in (
    "torch._inductor.compile_fx",
    "tests.forked",
    "wanexport.exporter.backends.aoti.compile",
    "wanexport.exporter.backends.aoti.proof_process",
    "wanexport.exporter.backends.onnx.proof_process",
    "wanexport.exporter.build",
    "wanexport.exporter.compare.compare",
):
    import_module(module)
spare_the_disk()
read_once()
ONNXRegistry.from_torchlib(opset_version=TORCHLIB_OPSET)
gc.collect()
gc.freeze()  # a collection of garbage would write to every page that forks share
gc.set_threshold(100_000, 20, 100)
