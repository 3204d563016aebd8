"""What follows from a VAE's sizes: the layout of its weights file."""

from functools import lru_cache
from hashlib import sha256

from wanexport.runtime.bundle.signature import stored_layout
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import computes_fp32, parameter_shapes


def vae_weights_layout(config: VaeConfig, dtype: str) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header and entries of the weights file of an engine that decodes in fp32, bf16 or fp16."""
    return stored_layout(parameter_shapes(config), computes_fp32, dtype)


@lru_cache(maxsize=16)
def vae_layout_sha256(config: VaeConfig, dtype: str) -> str:
    """Hash of the header of that file: its layout."""
    return sha256(vae_weights_layout(config, dtype)[0]).hexdigest()
