"""What follows from a model's sizes and a geometry: its Program, and its weights' layout.

The runtime holds a manifest against it before any compiled code is called.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256

from wanexport.runtime.bundle.tensorfile import TensorEntry, make_header
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Program
from wanexport.runtime.wan_config import WanConfig

_FP32_PARAMETERS = re.compile(
    r"time_embedding\.|time_projection\.|head\.|.*modulation$|.*norm|img_emb\.(proj\.[04]\.|emb_pos)"
)


def program_of(config: WanConfig, geometry: Geometry) -> Program:
    """The calls of this model at a geometry. Raises BundleError for a family that is not known."""
    return family_of(config).program(config, geometry)


def parameter_shapes(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by its official name, in the order that the model has them.

    Raises BundleError for a family that is not known.
    """
    return family_of(config).parameters(config)


def stays_fp32(parameter: str) -> bool:
    """Whether the official code uses this parameter in fp32, whatever it computes in."""
    return _FP32_PARAMETERS.match(parameter) is not None


def weights_layout(config: WanConfig, dtype: str) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header and entries of the weights file of this config in fp32, bf16 or fp16."""
    return stored_layout(parameter_shapes(config), stays_fp32, dtype)


def stored_layout(
    shapes: Mapping[str, tuple[int, ...]], is_fp32: Callable[[str], bool], dtype: str
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header and entries of a file of these parameters, each in the dtype but what is in fp32."""
    stored = DTYPES[dtype].stored
    return make_header({n: ("F32" if is_fp32(n) else stored, shape) for n, shape in shapes.items()})


@lru_cache(maxsize=16)
def layout_sha256(config: WanConfig, dtype: str) -> str:
    """Hash of the header of the weights file of this config in fp32, bf16 or fp16: its layout."""
    return sha256(weights_layout(config, dtype)[0]).hexdigest()
