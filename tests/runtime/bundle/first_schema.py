"""Manifests of schema 1 by hand, as wanexport wrote them before it stated families and Programs.

Nothing of the product makes them: names, shapes and hashes are what that version wrote.
"""

from collections.abc import Sequence
from typing import Any

EXPERTS = ["high_noise", "low_noise"]
# Family -> input and output channels, CLIP tokens, whether there are experts, timesteps of 3
# frames, boundary, and the hash of the weights' header of a model of `SIZES` in bf16.
FAMILIES: dict[str, tuple[int, int, int, bool, int, float | None, str]] = {
    "t2v": (16, 16, 0, False, 1, None,
            "5ddb3629cb186213599de8fade34e49ad9bb5a0d7eff43b60af06aefedfadfe2"),
    "i2v": (36, 16, 257, False, 1, None,
            "037a7858183e86a811543b89de38df8295a0d9a46be3a13d1f8d3dba3cfbecc6"),
    "flf2v": (36, 16, 514, False, 1, None,
              "ad837afc428025f468c1ecc40c47327a1e75af70bdcfb82fe3ed4bb71363760b"),
    "t2v-a14b": (16, 16, 0, True, 1, 0.875,
                 "5ddb3629cb186213599de8fade34e49ad9bb5a0d7eff43b60af06aefedfadfe2"),
    "i2v-a14b": (36, 16, 0, True, 1, 0.9,
                 "4fd6c05b7647fb052185cff6e329a7fe3143766bca12498a85bbe71b1bdd6230"),
    "ti2v": (48, 48, 0, False, 3, None,
             "25c5b85d663f99b98674d9594ca5cf1dedeba1daded9b1777a204883cc8b97e4"),
}  # fmt: skip
SIZES = {
    "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "text_dim": 4096, "text_len": 512,
    "freq_dim": 256, "eps": 1e-06,
}  # fmt: skip
_EMBED = [
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
    "time_embedding.2", "time_projection.1",
]  # fmt: skip
_FILES = {
    "onnx": ["denoiser"],
    "aoti": ["embed", "block", "head"],
    "tensorrt": ["denoiser", "layers"],
}
_TARGETS = {
    "onnx": {"device": "cpu", "machine": "x86_64", "onnxruntime": "1.31.1"},
    "aoti": {"device": "cuda", "arch": "sm90", "march": "x86-64-v3", "torch": "2.13.0+cu130",
             "cuda": "13.0", "cudnn": "91300", "gpu": "NVIDIA H100 80GB HBM3"},
    "tensorrt": {"device": "cuda", "arch": "sm89", "tensorrt": "10.16.1.11"},
}  # fmt: skip


def manifest(family: str, *engines: Any) -> dict[str, Any]:
    """The manifest of a small model of a family, with its weights in bf16 and these engines."""
    inputs, outputs, tokens, has_experts, *_, layout = FAMILIES[family]
    experts = EXPERTS if has_experts else [""]
    channels = {"in_channels": inputs, "out_channels": outputs, "image_tokens": tokens}
    return {
        "model": "small",
        "config": {**SIZES, **channels},
        "experts": experts if has_experts else [],
        "weights": {f"{expert}-bf16".strip("-"): _weights(expert, layout) for expert in experts},
        "engines": list(engines),
        "wanexport": "0.1.0",
        "schema": 1,
    }


def _weights(expert: str, layout: str) -> dict[str, Any]:
    label = f"{expert}-bf16".strip("-")
    return {
        "dtype": "bf16",
        "expert": expert,
        "file": file(f"weights/{label}/denoiser.safetensors"),
        "header_sha256": layout,
        "content": "c" * 64,
        "source": {"hub": "Wan-AI/Wan2.1-T2V-1.3B", "revision": None},
    }


def file(path: str) -> dict[str, Any]:
    """A file's record; there is no such file."""
    return {"path": path, "size": 1000, "sha256": "a" * 64}


def engine(family: str, backend: str, /, **changes: Any) -> dict[str, Any]:
    """An engine's record at 3 latent frames of 8 x 12; attention is told by numbers of keys."""
    _, channels, tokens, _, timesteps, boundary, layout = FAMILIES[family]
    stride = 16 if family == "ti2v" else 8
    latent = {"shape": [1, channels, 3, 8, 12], "dtype": "fp32"}
    keys = [72, 512, *([tokens] if tokens else [])]
    is_aoti = backend == "aoti"
    return {
        "backend": backend,
        "dtype": "bf16",
        "geometry": {
            "height": 8 * stride, "width": 12 * stride, "frames": 9, "spatial_stride": stride,
        },
        "inputs": _inputs(family, latent, timesteps),
        "output": latent,
        "sampling": {
            "steps": 50, "shift": 5.0, "guidance": [5.0, 5.0], "boundary": boundary, "fps": 16,
            "solver": "unipc",
        },
        "files": {role: file(f"engines/{backend}/{role}") for role in _FILES[backend]},
        "weights_header_sha256": layout,
        "key": "0123abcd",
        "target": _TARGETS[backend],
        "parameters": parameters(tokens) if is_aoti else {},
        "attention": {str(length): "cudnn" for length in keys} if is_aoti else {},
        "build": {"seconds": 1.5, "flops_per_forward": 10**9, "torch": "2.13.0"},
        "lint": {"host_sync": 0},
        "proof": {"method": "x", "blocks": 2, "tokens": 72, "error": 1e-3, "gate": 2e-3},
        "parity": {},
        **changes,
    }  # fmt: skip


def _inputs(family: str, latent: dict[str, Any], timesteps: int) -> dict[str, Any]:
    shapes: dict[str, Sequence[int]] = {
        "latent": latent["shape"],
        "timestep": [timesteps],
        "text": [1, 512, 4096],
    }
    if FAMILIES[family][0] == 36:
        shapes["condition"] = [1, 20, 3, 8, 12]
    if FAMILIES[family][2]:
        shapes["image"] = [1, FAMILIES[family][2], 1280]
    return {name: {"shape": list(shape), "dtype": "fp32"} for name, shape in shapes.items()}


def parameters(image_tokens: int = 0) -> dict[str, list[str]]:
    """The parameters of each region in its order, the block's as those of the first."""
    embed = [f"{name}.{part}" for name in _EMBED for part in ("weight", "bias")]
    if image_tokens == 514:
        embed.append("img_emb.emb_pos")
    if image_tokens:
        embed += [f"img_emb.proj.{i}.{part}" for i in (0, 1, 3, 4) for part in ("weight", "bias")]
    block = ["modulation", *_attention("self_attn"), "norm3.weight", "norm3.bias"]
    block += _attention("cross_attn")
    if image_tokens:
        block += [f"cross_attn.{n}_img.{part}" for n in "kv" for part in ("weight", "bias")]
        block += ["cross_attn.norm_k_img.weight"]
    block += [f"ffn.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    return {
        "embed": embed,
        "block": [f"blocks.0.{name}" for name in block],
        "head": ["head.modulation", "head.head.weight", "head.head.bias"],
    }


def _attention(name: str) -> list[str]:
    names = [f"{name}.{matrix}.{part}" for matrix in "qkvo" for part in ("weight", "bias")]
    return [*names, f"{name}.norm_q.weight", f"{name}.norm_k.weight"]
