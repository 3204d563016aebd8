"""Name what is no readable Wan transformer as what it is, from its bytes, names and shapes.

Nothing here reads weights. A reader of one of these formats takes the place of its row.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from wanexport.runtime.bundle.regular_file import open_regular
from wanexport.runtime.errors import BadRequest, printable

# Under which a Wan's names stand in the files that are read: ComfyUI's, and those of trainings.
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "generator.model.",
    "model.",
)
FSDP = "_fsdp_wrapped_module."  # in names wherever PyTorch's FSDP has wrapped a module
_HEAD = 1 << 16  # bytes of a file that tell what it is

_TAKE_FILES = (
    "take the model's .safetensors, .gguf or .pt file, as Wan-AI, Comfy-Org and others publish them"
)
_TAKE_PLAIN = "take a plain Wan: T2V, I2V, FLF2V, TI2V or an A14B"
_TAKE_WAN = "pass -m a Wan's diffusion transformer"
_AGAIN = "download the file itself again"
_NOT_READ = f"which is not read: {_TAKE_FILES}"

# First bytes of a file -> the format of those that are read.
_FORMATS = (
    (rb"GGUF", "gguf"),
    (rb"PK\x03\x04.{26}[^/]{1,200}/(\.format_version|data\.pkl|byteorder)", "torch"),
    (rb"\x80[\x02-\x05].", "torch"),  # before PyTorch 1.6
)
# The same -> what it is, and what to do.
_MAGIC = (
    (rb"PK\x03\x04", f"is a zip archive, {_NOT_READ}"),
    (rb"version https://git-lfs", f"is a git-lfs pointer in the place of a file: {_AGAIN}"),
    (rb"\S{0,40}/annex/objects/", f"is a git-annex pointer in the place of a file: {_AGAIN}"),
    (rb"\s*<", f"is a web page (HTML or XML) in the place of a file: {_AGAIN}"),
    (rb"\s*\{", "is JSON: pass -m the folder that it describes"),
    (rb"\x89HDF", f"is an HDF5 file, {_NOT_READ}"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is a packed archive: unpack it"),
    (rb".{257}ustar", "is a tar archive: unpack it"),
    (rb"[\t\r\n\x20-\x7e]{1,65536}\Z", f"is text in the place of a file: {_AGAIN}"),
)

_LORA = re.compile(
    r"lora_(A|B|a|b|up|down|mid)\b|lora\.(up|down)\b|^(lora_|lycoris_)|_loras?\.|\.(hada|lokr|oft)_"
    r"|dora_scale|\.(alpha|diff|diff_b|diff_m|set_weight|reshape_weight|w_norm|b_norm)$"
)
_NUNCHAKU = ".wscales"  # of a quantised model, which has low-rank parts of its own
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
    r"|_orig_mod|transformer|dit|net|pipe)\.)+"
)


def file_format(path: Path) -> str:
    """`safetensors`, `gguf` or `torch`, by a file's first bytes.

    Raises BadRequest for a file that is of another format, and one that cannot be read.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise BadRequest(f"cannot read {printable(path)}: {error.strerror}") from error
    try:
        head = os.read(descriptor, _HEAD)
    finally:
        os.close(descriptor)
    if not head:
        raise BadRequest(f"{printable(path)} is empty: {_AGAIN}")
    # First of all: the length of a header may begin as a pickle does.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if kind := _first_match(_FORMATS, head):
        return kind
    if what := _first_match(_MAGIC, head):
        raise BadRequest(f"{printable(path)} {what}")
    return "safetensors"


def _first_match(table: Iterable[tuple[bytes, str]], head: bytes) -> str | None:
    matches = (what for pattern, what in table if re.match(pattern, head, re.DOTALL))
    return next(matches, None)


def refuse_foreign_tensors(
    shapes: Mapping[str, tuple[int, ...]], path: Path, *, partial: bool = False
) -> None:
    """Raise BadRequest when tensors, by name, are of another thing than a readable Wan.

    partial is for one file of several, which may lack what tells a Wan.
    """
    if what := _tensors_kind({n.replace(FSDP, ""): shape for n, shape in shapes.items()}, partial):
        raise BadRequest(f"{printable(path)} {what}")


def _tensors_kind(shapes: Mapping[str, tuple[int, ...]], partial: bool) -> str | None:
    """What a file with these tensors is; None for a Wan's transformer, and for an unknown thing."""
    names = [_PREFIXES.sub("", name) for name in shapes]
    if any(map(_LORA.search, shapes)) and not any(name.endswith(_NUNCHAKU) for name in shapes):
        return "is a LoRA, no model: pass -m the model that it is for, and this with --lora"
    is_wan = any(name in _SIGNS for name in names)
    relative = _first(_RELATIVES, names)
    if relative and (is_wan or partial or "patch_embedding.weight" in names):
        return f"is of {relative}, which is not read yet: {_TAKE_PLAIN}"
    if not is_wan:
        return _other_kind(names)
    parts = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
    if extra := [part for part in parts if any(name.startswith(part) for name in shapes)]:
        return (
            f"is an all-in-one file, with {' and '.join(extra)}* beside the transformer, which is "
            f"not read yet: take the file of the transformer alone"
        )
    return _fun_kind(shapes) or _prefix_kind(shapes)


def _fun_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """A Wan-Fun that no tensor's name tells, by the channels of its input."""
    for name, shape in shapes.items():
        if name.endswith("patch_embedding.weight") and len(shape) == 5:
            if whose := _FUN_CHANNELS.get(shape[1]):
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


def prefix_of(names: Iterable[str]) -> str:
    """What stands before a Wan's names, of whatever file; empty where nothing tells."""
    for name in names:
        for sign in _SIGNS:
            if name == sign or name.endswith(f".{sign}"):
                return name.removesuffix(sign)
    return ""


def _prefix_kind(names: Iterable[str]) -> str | None:
    """The prefix under which a Wan's names stand, when it is none that is read."""
    prefix = prefix_of(names)
    if prefix in PREFIXES:
        return None
    return (
        f"is a Wan whose tensors' names begin with {printable(prefix)}, which is not read yet: "
        f"take a file whose names begin with blocks. or {PREFIXES[1]}blocks."
    )
