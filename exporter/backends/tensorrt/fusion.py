"""Whether TensorRT fuses every attention: one that it does not fuse keeps its scores in memory."""

import warnings
from typing import Any

from wanexport.exporter.backends.backend import Request, TensorRtOptions
from wanexport.runtime.errors import BadRequest, WanExportWarning


def check_fusion_can_be_known(request: Request, options: TensorRtOptions, is_here: bool) -> None:
    """Raise BadRequest where nothing will show whether attention is fused, unless that is allowed.

    is_here says whether this machine's GPU is the target, so that the plan can be opened.
    """
    if request.attention == "decomposed" and not is_here and not options.allow_unfused:
        raise BadRequest(
            f"whether TensorRT fuses decomposed attention shows only on a GPU, and there is no "
            f"{request.target['arch']} here: use --attention-operator native, or --allow-unfused"
        )


def check_fusion(request: Request, options: TensorRtOptions, report: dict[str, Any]) -> None:
    """Refuse an engine whose attention is not known to be fused, or warn where that is allowed.

    report has how many attentions the graphs have, and how many were fused. Raises BadRequest.
    """
    is_native = request.attention != "decomposed"
    found = report["attention_layers" if is_native else "attention_kernels"]
    expected = report["attention_expected"]
    if found is not None and found >= expected:
        return
    shown = "an unknown number" if found is None else str(found)
    message = (
        f"{request.label}: {shown} of {expected} attention layers are fused; others would keep "
        f"every score in GPU memory"
    )
    if not options.allow_unfused:
        raise BadRequest(f"{message}: use --attention-operator native, or --allow-unfused")
    warnings.warn(message, WanExportWarning, stacklevel=2)
