"""What is no readable Wan is named as what it is, by its content, in one line."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.graphs.foreign import file_format
from wanexport.runtime.errors import BadRequest, WanExportError


def refusal(path: Path) -> str:
    """What opening it as a checkpoint says: one line that names the file or folder."""
    with pytest.raises(WanExportError) as refused:
        open_checkpoint(path)
    message = str(refused.value)
    assert "\n" not in message and str(path) in message and len(message) < 600 + len(str(path))
    return message.replace(str(path), "PATH")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>404</html>", r"is a web page"),
        (b"\n<?xml version='1.0'?><Error/>", r"is a web page"),
        (LFS, "is a git-lfs pointer"),
        (b"/annex/objects/MD5-s1--x\n", "is a git-annex pointer"),
        (b"../../.git/annex/objects/x/y", "is a git-annex pointer"),
        (b"Entry not found", "is text in the place of a file: download"),
        (b'{"weight_map": {}}', "is JSON: pass -m the folder"),
        (b"", "is empty"),
        (
            pickle.dumps({"a": 1}, 2),
            "no file of torch.save|no model|more than tensors",
        ),
        (pickle.dumps({"a": 1}), "no file of torch.save|no model|more than tensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
        (b"\x1f\x8b" + bytes(64), "is a packed archive"),
        (bytes(257) + b"ustar" + bytes(64), "is a tar archive"),
        (bytes(64), "damaged safetensors header"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.pth"])
def test_a_file_is_named_by_its_first_bytes_whatever_its_name(
    content: bytes, what: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WanExportError, match=what):
        open_checkpoint(tmp_path / name)
    refusal(tmp_path / name)


def test_a_zip_archive_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/weights.npy", b"x")
    assert "is a zip archive, which is not read: take" in refusal(file)


def wan(prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Names and dtypes of a Wan in the official layout, without its sizes."""
    names = ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "blocks.0.modulation",
             "blocks.0.ffn.0.weight", "head.modulation", "head.head.weight")  # fmt: skip
    return {prefix + name: torch.ones(2).to(dtype) for name in names}


def diffusers_wan(prefix: str = "") -> dict[str, Tensor]:
    names = ("patch_embedding.weight", "condition_embedder.time_proj.weight", "scale_shift_table",
             "blocks.0.attn1.to_q.weight", "blocks.0.ffn.net.2.weight")  # fmt: skip
    return {prefix + name: torch.ones(2) for name in names}


def named(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.ones(2).to(dtype) for name in names}


COMFY = "model.diffusion_model."
Q = "blocks.0.self_attn.q"
TENSORS = {
    "a LoRA": [
        named(f"diffusion_model.{Q}.lora_A.weight", f"diffusion_model.{Q}.lora_B.weight"),
        named(f"diffusion_model.{Q}.lora_down.weight", f"diffusion_model.{Q}.alpha"),
        named("lora_unet_blocks_0_self_attn_q.lora_down.weight"),
        named("lora_unet__blocks_0_cross_attn_k.lora_up.weight"),
        named("transformer.blocks.0.attn1.to_q.lora_A.weight"),
        named("base_model.model.blocks.0.cross_attn.k.lora_A.weight"),
        named(f"pipe.dit.{Q}.lora_A.default.weight"),
        named(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"),
        named("lycoris_blocks_0_attn1_to_q_ffn_net_0_proj.lokr_w1"),
        named(f"diffusion_model.{Q}.hada_w1_a"),
        named(f"diffusion_model.{Q}.dora_scale"),
        named("diffusion_model.blocks.0.norm3.diff", "diffusion_model.blocks.0.norm3.diff_b"),
        named("diffusion_model.blocks.0.diff_m"),
        named("vace_blocks.0.self_attn.q.lora_A.weight"),
        named(f"{Q}_loras.down.weight"),
    ],
    "no diffusion transformer": [
        named("encoder.conv1.weight", "decoder.middle.0.residual.0.gamma", "conv1.weight"),
        named("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"),
        named("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        named("token_embedding.weight", "blocks.0.attn.q.weight"),
        named("visual.patch_embedding.weight", "log_scale"),
        named("vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        named("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
    ],
    "of VACE": [
        {**wan(), **named("vace_blocks.0.self_attn.q.weight", "vace_patch_embedding.weight")},
        {**diffusers_wan(), **named("vace_blocks.0.proj_in.weight")},
        {**wan(COMFY), **named(f"{COMFY}vace_blocks.0.norm3.bias")},
    ],
    "of Wan-Animate": [{**wan(), **named("face_adapter.fuser_blocks.0.k_norm.weight")}],
    "of Wan-S2V": [{**wan(), **named("casual_audio_encoder.encoder.final_linear.weight")}],
    "of Wan-Fun with camera control": [{**wan(), **named("control_adapter.conv.weight")}],
    "of Wan-Fun-Control": [{**wan(), **named("ref_conv.weight")}],
    "of lingbot-world": [{**wan(), **named("patch_embedding_wancamctrl.weight")}],
    "of Helios": [{**diffusers_wan(), **named("patch_short.weight", "patch_mid.weight")}],
    "names begin with _orig_mod.": [wan("_orig_mod.")],
    "names begin with module.": [wan("module.")],
    "names begin with transformer.": [diffusers_wan("transformer.")],
    "is an all-in-one file": [
        {**wan("model.diffusion_model."), **named("vae.decoder.conv1.weight")},
        {**wan("model.diffusion_model."), **named("text_encoders.umt5xxl.shared.weight")},
    ],
    "is HunyuanVideo's transformer, no Wan": [
        named("double_blocks.0.img_attn.q.weight", "txt_in.individual_token_refiner.x.weight")
    ],
    "is Flux's transformer, no Wan": [
        named("double_blocks.0.img_attn.q.weight", "single_blocks.0.linear1.weight"),
        named("single_transformer_blocks.0.attn.to_q.weight"),
    ],
    "is another model's transformer, no Wan": [named("transformer_blocks.0.attn1.to_q.weight")],
    "is LTX-Video's transformer, no Wan": [named("patchify_proj.weight")],
    "is Stable Diffusion's transformer, no Wan": [
        named("model.diffusion_model.input_blocks.0.0.weight"), named("joint_blocks.0.x.weight"),
        named("down_blocks.0.resnets.0.conv1.weight"),
    ],
}  # fmt: skip
CASES = [(what, tensors) for what, cases in TENSORS.items() for tensors in cases]


@pytest.mark.parametrize(("what", "tensors"), CASES)
def test_a_safetensors_file_is_named_by_its_tensors(
    what: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    assert what in refusal(tmp_path / "diffusion_pytorch_model.safetensors")
    message = refusal(tmp_path)
    assert what in message and (": take " in message or "pass -m" in message)


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_header_whose_length_begins_as_a_pickle_does_is_no_pickle(
    version: int, tmp_path: Path
) -> None:
    """Of 0x80 and the version, least byte first; the text is padded with spaces."""
    length = 0x80 + 256 * version
    save_file(wan(), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    own = int.from_bytes(content[:8], "little")
    length = next(n for n in range(length, 1 << 20, 1 << 16) if n >= own)
    padded = content[8 : 8 + own] + b" " * (length - own)
    (tmp_path / "wan.safetensors").write_bytes(
        length.to_bytes(8, "little") + padded + content[8 + own :]
    )
    assert file_format(tmp_path / "wan.safetensors") == "safetensors"


def test_a_part_beside_the_transformer_is_named(tmp_path: Path) -> None:
    save_file(wan(), tmp_path / "wan.safetensors")
    save_file(named("decoder.conv1.weight"), tmp_path / "vae.safetensors")
    with pytest.raises(BadRequest, match=r"vae\.safetensors is a VAE, no diffusion transfor"):
        open_checkpoint(tmp_path)
