"""What the manifest says of a proof, and the seeded call that it is made of."""

from typing import TYPE_CHECKING, Any

import numpy as np

from wanexport.exporter.reference.parity import measure
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

if TYPE_CHECKING:
    pass


TIMESTEP = 812.0
SEED = 0


def proof_figures(
    dtype: str,
    method: str,
    config: WanConfig,
    geometry: Geometry,
    velocity: np.ndarray,
    reference: np.ndarray,
    floor: np.ndarray | None,
) -> dict[str, Any]:
    """What the manifest says of the proof. Raises WanExportError when it failed."""
    _check_finite(dtype, reference, velocity)
    parity = measure(velocity, reference, floor)
    if not parity.passed:
        raise WanExportError(
            f"relative L2 error {parity.error:.2e} is over the gate {parity.gate:.2e}: "
            f"this is a fault of wanexport or of a library, please report it"
        )
    return {
        "method": method,
        "blocks": config.num_layers,
        "tokens": geometry.num_tokens,
        "error": parity.error,
        "floor": parity.floor,
        "gate": parity.gate,
    }


def _check_finite(dtype: str, reference: np.ndarray, velocity: np.ndarray) -> None:
    if not np.isfinite(reference).all():
        raise WanExportError("the model gives NaN or Inf in eager fp32: check the checkpoint")
    if not np.isfinite(velocity).all():
        raise WanExportError(
            f"the {dtype} engine gives NaN or Inf: build with --dtype bf16 or fp32"
        )
