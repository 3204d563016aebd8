"""What `compare` is asked for, and what of it needs no bundle to be seen as wrong."""

from dataclasses import dataclass
from pathlib import Path

from wanexport.exporter.compare.peers import check_implementation
from wanexport.exporter.model_source import check_of_model
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.errors import BadRequest


@dataclass(frozen=True)
class CompareRequest:
    """What an engine is held against, and on which inputs.

    reference is `graph` or `diffusers`: whose fp32 forward with the engine's weights is right;
    model names the checkpoint to take its tensors from instead, or with low_noise the high-noise
    one of two; ema is as in `build`. The loop has `steps` steps with the engine's solver and
    guidance; inputs is a safetensors file for it, as `run` takes it. In its place calls is such a
    file of single calls (see `recorded`), and outputs the velocities recorded for them, computed in
    outputs_dtype with the precision policy of reference. against is the backend of another engine,
    in the place of a model; bisect looks for the first faulty call, and for the first faulty node
    of an ONNX graph. Of a causal engine, chunks are how many are made, by default the clip's, and
    window, sink and max_attention are as in `Denoiser.stream`.
    """

    model: str | Path | None = None
    low_noise: str | Path | None = None
    ema: bool | None = None
    reference: str = "graph"
    inputs: Path | None = None
    calls: Path | None = None
    outputs: Path | None = None
    outputs_dtype: str = "fp32"
    steps: int = 4
    seed: int = 0
    against: str | None = None
    bisect: bool = False
    chunks: int | None = None
    window: int | None = None
    sink: int = 0
    max_attention: int | None = None


def check_request(request: CompareRequest) -> None:
    """Raise BadRequest for what needs no bundle to be seen as wrong."""
    check_of_model(request.model, request.low_noise, request.ema)
    check_implementation(request.reference)
    if request.inputs is not None and request.calls is not None:
        raise BadRequest("inputs are of a loop, calls are single ones: pass one of the two")
    if request.outputs is not None and request.calls is None:
        raise BadRequest(
            "outputs are of recorded calls: pass the file of these calls too (--calls)"
        )
    if request.outputs_dtype not in PRECISIONS:
        raise BadRequest(
            f"unknown outputs dtype {request.outputs_dtype!r}: expected one of "
            f"{', '.join(PRECISIONS)}"
        )
    if request.against is not None:
        _check_against(request)
    if request.bisect and request.outputs is not None:
        raise BadRequest(
            "recorded outputs have no values between calls to bisect by: leave --outputs out, and "
            "the reference is a model"
        )


def _check_against(request: CompareRequest) -> None:
    """Raise BadRequest for what another engine as the reference leaves no place for."""
    others = {
        "--model": request.model,
        "--reference": None if request.reference == "graph" else request.reference,
        "--outputs": request.outputs,
    }
    if given := [name for name, value in others.items() if value is not None]:
        raise BadRequest(
            f"--against makes an engine the reference, and {given[0]} names another: leave one out"
        )
