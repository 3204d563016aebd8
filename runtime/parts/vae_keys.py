"""The official VAE files in diffusers' terms: names of the tensors, and the config they imply.

Wan2.1_VAE.pth and Wan2.2_VAE.pth hold the official `WanVAE_`; diffusers' class for both is
`AutoencoderKLWan`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanexport.runtime.errors import BundleError, WanExportError, printable
from wanexport.runtime.key_tables import key_table, required

_UP_BLOCK_LAYERS = 4  # three residual blocks and an upsampler; Wan2.1 numbers all in one row
_UP_LAYERS = {f"decoder.upsamples.{i}": divmod(i, _UP_BLOCK_LAYERS) for i in range(16)}
# Official name -> diffusers' name, here and below, as `key_table` reads them.
_RESIDUAL = {
    "residual.0.*": "norm1.*",
    "residual.2.*": "conv1.*",
    "residual.3.*": "norm2.*",
    "residual.6.*": "conv2.*",
    "shortcut.*": "conv_shortcut.*",
}
_RESIDUAL_BLOCKS = {
    "encoder.middle.0": "encoder.mid_block.resnets.0",
    "encoder.middle.2": "encoder.mid_block.resnets.1",
    "decoder.middle.0": "decoder.mid_block.resnets.0",
    "decoder.middle.2": "decoder.mid_block.resnets.1",
    "encoder.downsamples.{}": "encoder.down_blocks.{}",
    "encoder.downsamples.{}.downsamples.{}": "encoder.down_blocks.{}.resnets.{}",
    **{name: f"decoder.up_blocks.{i}.resnets.{layer}" for name, (i, layer) in _UP_LAYERS.items()},
    "decoder.upsamples.{}.upsamples.{}": "decoder.up_blocks.{}.resnets.{}",
}
_RESAMPLERS = {
    "encoder.downsamples.{}": "encoder.down_blocks.{}",
    "encoder.downsamples.{}.downsamples.{}": "encoder.down_blocks.{}.downsampler",
    **{name: f"decoder.up_blocks.{i}.upsamplers.0" for name, (i, _) in _UP_LAYERS.items()},
    "decoder.upsamples.{}.upsamples.{}": "decoder.up_blocks.{}.upsampler",
}
_ROWS = {
    "conv1.*": "quant_conv.*",
    "conv2.*": "post_quant_conv.*",
    "encoder.conv1.*": "encoder.conv_in.*",
    "encoder.middle.1.norm.*": "encoder.mid_block.attentions.0.norm.*",
    "encoder.middle.1.to_qkv.*": "encoder.mid_block.attentions.0.to_qkv.*",
    "encoder.middle.1.proj.*": "encoder.mid_block.attentions.0.proj.*",
    "encoder.head.0.*": "encoder.norm_out.*",
    "encoder.head.2.*": "encoder.conv_out.*",
    "decoder.conv1.*": "decoder.conv_in.*",
    "decoder.middle.1.norm.*": "decoder.mid_block.attentions.0.norm.*",
    "decoder.middle.1.to_qkv.*": "decoder.mid_block.attentions.0.to_qkv.*",
    "decoder.middle.1.proj.*": "decoder.mid_block.attentions.0.proj.*",
    "decoder.head.0.*": "decoder.norm_out.*",
    "decoder.head.2.*": "decoder.conv_out.*",
    **{f"{block}.resample.1.*": f"{to}.resample.1.*" for block, to in _RESAMPLERS.items()},
    **{f"{block}.time_conv.*": f"{to}.time_conv.*" for block, to in _RESAMPLERS.items()},
    **{
        f"{block}.{layer}": f"{to}.{to_layer}"
        for block, to in _RESIDUAL_BLOCKS.items()
        for layer, to_layer in _RESIDUAL.items()
    },
}
diffusers_name = key_table(_ROWS)
_WAN22_ONLY = "encoder.downsamples.0.downsamples.0.residual.2.weight"

# Mean and standard deviation of each latent channel by their number: wan/modules/vae.py of the
# official Wan2.1 and wan/modules/vae2_2.py of Wan2.2, at the end.
# fmt: off
_LATENTS_MEAN = {
    16: (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    48: (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
         -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
         -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
         -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
         0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
}
_LATENTS_STD = {
    16: (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    48: (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
         0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
         0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
         0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
         0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
}
# fmt: on


def config_of(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """The arguments of AutoencoderKLWan for the official tensors of these shapes.

    Raises BundleError when a tensor that decides them is missing, or when the latents have
    neither 16 nor 48 channels. `path` is named in errors.
    """
    what = f"{printable(path)} is no Wan VAE"
    shape = required(shapes, what, "Wan2.1_VAE.pth or Wan2.2_VAE.pth", BundleError)
    base_dim, in_channels = shape("encoder.conv1.weight", 5)[:2]
    out_channels, decoder_base_dim = shape("decoder.head.2.weight", 5)[:2]
    channels = shape("conv2.weight", 5)[0]
    mean, deviation = latent_statistics(channels, path, BundleError)
    is_wan22 = _WAN22_ONLY in shapes
    return {
        "base_dim": base_dim,
        "decoder_base_dim": decoder_base_dim,
        "z_dim": channels,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "latents_mean": list(mean),
        "latents_std": list(deviation),
        "is_residual": is_wan22,
        "patch_size": 2 if is_wan22 else None,
        "scale_factor_spatial": 16 if is_wan22 else 8,
    }


def latent_statistics(
    channels: int, path: Path, error: type[WanExportError]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the VAE whose latents have so many.

    Raises the error, naming path, where there is none.
    """
    if channels not in _LATENTS_MEAN:
        raise error(
            f"{printable(path)} has latents of {channels} channels: expected 16 "
            f"(Wan2.1_VAE.pth) or 48 (Wan2.2_VAE.pth)"
        )
    return _LATENTS_MEAN[channels], _LATENTS_STD[channels]
