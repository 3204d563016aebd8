"""Name what is no readable Wan transformer as what it is, from its bytes, names and dtypes.

Nothing here reads weights. A reader of one of these formats takes the place of its row.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.errors import BadRequest, WanExportError, printable

PREFIX = "model.diffusion_model."  # of ComfyUI's files, which is read
_HEAD = 1 << 16  # bytes of a file that tell what it is

_TAKE_SAFETENSORS = (
    "take the model's .safetensors in fp32, bf16 or fp16, as Wan-AI and Comfy-Org publish them"
)
_TAKE_UNQUANTISED = "take the fp32, bf16 or fp16 file of the same model"
_TAKE_PLAIN = "take a plain Wan: T2V, I2V, FLF2V, TI2V or an A14B"
_TAKE_WAN = "pass -m a Wan's diffusion transformer"
_AGAIN = "download the file itself again"
_NO_SAFETENSORS = f"which is not read: {_TAKE_SAFETENSORS}"
_NOT_YET = f"which is not read yet: {_TAKE_SAFETENSORS}"

# First bytes of a file -> what it is, and what to do.
_MAGIC = (
    (rb"GGUF", f"is a GGUF file, {_NOT_YET}"),
    (
        rb"PK\x03\x04.{26}[^/]{1,200}/data\.pkl(?=.*generator)",
        f"is a file of torch.save with a causal Wan's generator (Self-Forcing), {_NOT_YET}",
    ),
    (rb"PK\x03\x04.{26}[^/]{1,200}/data\.pkl", f"is a file of torch.save, {_NOT_YET}"),
    (rb"PK\x03\x04", f"is a zip archive, {_NO_SAFETENSORS}"),
    (rb"\x80[\x02-\x05].", f"is a pickle (an old file of torch.save), {_NOT_YET}"),
    (rb"version https://git-lfs", f"is a git-lfs pointer in the place of a file: {_AGAIN}"),
    (rb"\S{0,40}/annex/objects/", f"is a git-annex pointer in the place of a file: {_AGAIN}"),
    (rb"\s*<", f"is a web page (HTML or XML) in the place of a file: {_AGAIN}"),
    (rb"\s*\{", "is JSON: pass -m the folder that it describes"),
    (rb"\x89HDF", f"is an HDF5 file, {_NO_SAFETENSORS}"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is a packed archive: unpack it"),
    (rb".{257}ustar", "is a tar archive: unpack it"),
    (rb"[\t\r\n\x20-\x7e]{1,65536}\Z", f"is text in the place of a file: {_AGAIN}"),
)

_LORA = re.compile(
    r"lora_(A|B|a|b|up|down|mid)\b|lora\.(up|down)\b|^(lora_|lycoris_)|_loras?\.|\.(hada|lokr|oft)_"
    r"|dora_scale|\.(alpha|diff|diff_b|diff_m|set_weight|reshape_weight|w_norm|b_norm)$"
)
# A name's pattern, under no prefix or any -> what has it. The first that fits is told.
_RELATIVES = (
    (r"vace_(blocks|patch_embedding)\.", "VACE"),
    (r"(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.", "Wan-Animate"),
    (r"(casual_audio_encoder|audio_injector|frame_packer)\.|trainable_cond_mask", "Wan-S2V"),
    (r"audio_proj\.|audio_cross_attn\.", "Wan with an audio branch (HuMo, MultiTalk, ...)"),
    (r"control_adapter\.", "Wan-Fun with camera control"),
    (r"ref_conv\.", "Wan-Fun-Control"),
    (r"patch_embedding_wancamctrl\.|cam_injector_layer", "lingbot-world (a causal Wan)"),
    (r"patch_(short|mid|long)\.|history_key_scale", "Helios"),
    (r"dwpose_embedding|randomref_embedding", "UniAnimate"),
    (r"fps_embedding|fps_projection", "SkyReels-V2 (diffusion forcing)"),
)
_OTHERS = (
    (r"(txt_in|context_embedder)\.(individual_)?token_refiner", "HunyuanVideo's"),
    (r"(double_blocks|single_blocks|single_transformer_blocks)\.\d", "Flux's"),
    (r"transformer_blocks\.\d+\.(attn|ff|norm)", "another model's"),
    (r"joint_blocks\.|(input|output|down|up|middle|mid)_blocks?\.", "Stable Diffusion's"),
    (r"(patchify_proj|adaln_single)\.", "LTX-Video's"),
)
_PARTS = (
    (r"(vision_model|visual|textual|text_model)\.|logit_scale|log_scale", "CLIP model"),
    (r"(token_embedding|SelfAttention|relative_attention_bias)\.|shared\.weight", "text encoder"),
    (r"embed_tokens\.|layers\.\d+\.self_attn\.|spiece_model", "text encoder"),
    (r"(encoder|decoder)\.(conv1|conv_in|conv_out|mid_block|middle|downsamples|\d+)\.", "VAE"),
    (r"(post_)?quant_conv\.|first_stage_model\.", "VAE"),
)
_FUN_CHANNELS = {  # 48 in and 48 out is TI2V's
    32: "Wan-Fun-Control",
    52: "Wan2.2-Fun-Control",
    100: "Wan2.2-Fun-5B-InP",
    148: "Wan2.2-Fun-5B-Control",
}
_SIGNS = ("head.modulation", "condition_embedder.time_proj.weight")  # of a Wan, in each layout
_PREFIXES = re.compile(
    r"^(model\.diffusion_model\.|(generator|generator_ema|critic|model|module|diffusion_model"
    r"|_orig_mod|_fsdp_wrapped_module|transformer|dit|net|pipe)\.)+"
)
_LOW_PRECISION = {
    "F8_E4M3": "fp8 (e4m3)",
    "F8_E5M2": "fp8 (e5m2)",
    "F8_E4M3FNUZ": "fp8 (e4m3fnuz)",
    "F8_E5M2FNUZ": "fp8 (e5m2fnuz)",
    "F8_E8M0": "mxfp8",
    "F6_E2M3": "fp6",
    "F6_E3M2": "fp6",
    "F4": "fp4",
    "I8": "int8",
    "U8": "4 bits",
}
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_\w+)?|input_scale|comfy_quant"
    r"|pre_quant_scale|absmax|quant_map|_data|_scale)$"
)


def refuse_foreign_file(path: Path) -> None:
    """Raise BadRequest for a file that its first bytes tell to be no safetensors file."""
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise BadRequest(f"cannot read {printable(path)}: {error.strerror}") from error
    try:
        head = os.read(descriptor, _HEAD)
    finally:
        os.close(descriptor)
    if what := _file_kind(head):
        raise BadRequest(f"{printable(path)} {what}")


def find_unread_file(files: Iterable[Path]) -> str | None:
    """What the first file is, after its name, that may be a model in a format that is not read."""
    for file in files:
        try:
            refuse_foreign_file(file)
        except WanExportError as error:
            if _NOT_YET in str(error):
                return str(error)
    return None


def _file_kind(head: bytes) -> str | None:
    """What a file is that begins so; None for a safetensors file, and for an unknown one."""
    if not head:
        return f"is empty: {_AGAIN}"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return None
    matches = (what for pattern, what in _MAGIC if re.match(pattern, head, re.DOTALL))
    return next(matches, None)


def refuse_foreign_tensors(
    entries: Mapping[str, TensorEntry], path: Path, *, partial: bool = False
) -> None:
    """Raise BadRequest when tensors are of another thing than a readable Wan.

    partial is for one file of several, which may lack what tells a Wan.
    """
    if what := _tensors_kind(entries, partial):
        raise BadRequest(f"{printable(path)} {what}")


def _tensors_kind(entries: Mapping[str, TensorEntry], partial: bool) -> str | None:
    """What a file with these tensors is; None for a Wan's transformer, and for an unknown thing."""
    if any(map(_LORA.search, entries)):
        return "is a LoRA, which is not read yet: merge it into the model first, and pass -m that"
    names = [_PREFIXES.sub("", name) for name in entries]
    is_wan = any(name in _SIGNS for name in names)
    relative = _first(_RELATIVES, names)
    if relative and (is_wan or partial or "patch_embedding.weight" in names):
        return f"is of {relative}, which is not read yet: {_TAKE_PLAIN}"
    if not is_wan:
        return _other_kind(names)
    parts = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
    if extra := [part for part in parts if any(name.startswith(part) for name in entries)]:
        return (
            f"is an all-in-one file, with {' and '.join(extra)}* beside the transformer, which is "
            f"not read yet: take the file of the transformer alone"
        )
    return _fun_kind(entries) or _quantised_kind(entries) or _prefix_kind(entries)


def _fun_kind(entries: Mapping[str, TensorEntry]) -> str | None:
    """A Wan-Fun that no tensor's name tells, by the channels of its input."""
    for name, entry in entries.items():
        if name.endswith("patch_embedding.weight") and len(entry.shape) == 5:
            if whose := _FUN_CHANNELS.get(entry.shape[1]):
                return f"is of {whose}, which is not read yet: {_TAKE_PLAIN}"
    return None


def _first(table: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    """The first row of a table whose pattern begins any of the names, or a part of one."""
    names = list(names)
    for pattern, what in table:
        compiled = re.compile(rf"(^|\.)({pattern})")
        if any(map(compiled.search, names)):
            return what
    return None


def _other_kind(names: list[str]) -> str | None:
    """A part of a pipeline, or another model's transformer; None for neither."""
    if part := _first(_PARTS, names):
        return f"is a {part}, no diffusion transformer: {_TAKE_WAN}"
    if model := _first(_OTHERS, names):
        return f"is {model} transformer, no Wan: {_TAKE_WAN}"
    return None


def _quantised_kind(entries: Mapping[str, TensorEntry]) -> str | None:
    """The quantisation of a Wan; None where there is none."""
    scales = {match[2] for name in entries if (match := _SCALES.search(name))}
    weights = {entry.dtype for name, entry in entries.items() if not _SCALES.search(name)}
    low = [kind for dtype, kind in _LOW_PRECISION.items() if dtype in weights]
    if not scales and not low:
        return None
    if "weight_scale_2" in scales:
        kind = "nvfp4"
    elif "_data" in scales:
        kind = "int8 or fp8 (quanto)"
    elif {"absmax", "quant_map"} & scales:
        kind = "4 or 8 bits (bitsandbytes)"
    else:
        kind = low[0] if low else "a format with " + ", ".join(sorted(scales))
    if kind.startswith("fp8"):
        kind = f"{'scaled' if scales else 'plain'} {kind}"
    return f"is quantised to {kind}, which is not read yet: {_TAKE_UNQUANTISED}"


def _prefix_kind(entries: Mapping[str, TensorEntry]) -> str | None:
    """The prefix under which a Wan's names stand, when it is none that is read."""
    for name in entries:
        for sign in _SIGNS:
            prefix = name.removesuffix(sign)
            if prefix not in (name, "", PREFIX):
                return (
                    f"is a Wan whose tensors' names begin with {printable(prefix)}, which is not "
                    f"read yet: take a file whose names begin with blocks. or {PREFIX}blocks."
                )
    return None
