"""What the JSON files of a checkpoint state: read with bounds, and held against its tensors.

Heads, text_len and eps follow from no tensor and are taken from a Wan's config.json. Whatever else
it states must be so, or the checkpoint is refused. docs/checkpoints.md has the table.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanexport.graphs.json_file import brief, read_object
from wanexport.runtime.errors import BadRequest, WanExportWarning, printable
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig

HEAD_DIM = 128  # of every published Wan; used when a checkpoint comes without a Wan's config.json
MAX_TEXT_LEN = 8192
SELF_FORCING = "self-forcing"  # the family of a causal Wan with a plain Wan's tensors
_CAUSAL_CLASSES = ("CausalWanModel",)  # Self-Forcing's and its relatives' own name
_PLAIN_CLASSES = ("WanModel", "WanTransformer3DModel")
_WAN_CLASSES = (*_PLAIN_CLASSES, *_CAUSAL_CLASSES)
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
# A part of a class name, in lower case -> whose it is. The first that fits is told.
_RELATIVES = (
    ("vace", "VACE"),
    ("animate", "Wan-Animate"),
    ("s2v", "Wan-S2V"),
    ("causal", "another causal Wan than Self-Forcing's"),
    ("fast", "lingbot-world (a causal Wan)"),
    ("skyreels", "SkyReels-V2"),
    ("helios", "Helios"),
    ("chronoedit", "ChronoEdit"),
    ("control", "a Wan with control inputs"),
    ("camera", "a Wan with camera control"),
    ("wan", "a relative of Wan"),
)
# model_type of an official config -> condition channels, CLIP tokens and whether the VAE is 2.2's.
_MODEL_TYPES = {
    "t2v": ((0, 0, False),),
    "ti2v": ((0, 0, True),),
    "i2v": ((20, 0, False), (20, 257, False)),
    "flf2v": ((20, 514, False),),
}
_RELATED_TYPES = ("vace", "s2v", "animate", "camera", "control", "humo")
# Fields that only a relative's config has; null, false, zero and nothing are what a plain Wan has.
_RELATIVE_FIELDS = {
    "vace_layers": "VACE",
    "vace_in_dim": "VACE",
    "vace_in_channels": "VACE",
    "motion_encoder_dim": "Wan-Animate",
    "face_encoder_hidden_dim": "Wan-Animate",
    "audio_dim": "Wan-S2V",
    "audio_inject_layers": "Wan-S2V",
    "cond_dim": "Wan-S2V",
    "control_type": "lingbot-world (a causal Wan)",
    "add_control_adapter": "Wan-Fun with camera control",
    "add_ref_conv": "Wan-Fun-Control",
    "inject_sample_info": "SkyReels-V2",
}
# How a stream of a causal Wan is made, which its engine does not depend on.
_OF_STREAMS = ("local_attn_size", "sink_size", "num_frame_per_block", "independent_first_frame")
_NOTHING: tuple[object, ...] = (None, False, 0, -1, [], {}, "")
# Names with _ in front are of the software that wrote the file; rope_max_seq_len is the length of a
# table of angles, and changes none of them.
_IGNORED = ("rope_max_seq_len", "architectures", "torch_dtype", "dtype", "quantization_config")


def read_config(file: Path, *, owned: bool) -> dict[str, Any]:
    """A Wan's config.json, empty when there is none; owned is whether it must be of this model.

    What is of something else entirely is passed over with a warning, unless owned. Raises
    WanExportError for a damaged file, and for a config of a relative of Wan.
    """
    stated = read_object(file)
    other = _whose(stated, file)
    if other is None:
        return stated
    if owned:
        raise BadRequest(
            f"{printable(file)} is of {other}, but the tensors beside it are a Wan's: put the "
            f"Wan's own config.json there, or delete it"
        )
    warnings.warn(
        f"{printable(file)} is of {other} and was not read: heads are taken to be {HEAD_DIM} wide",
        WanExportWarning,
        stacklevel=2,
    )
    return {}


def is_of_causal(stated: Mapping[str, Any]) -> bool:
    """Whether a config says that it is of a causal Wan with the tensors of a plain one."""
    return stated.get("_class_name") in _CAUSAL_CLASSES


def _whose(stated: Mapping[str, Any], file: Path) -> str | None:
    """What else than a Wan a config is of; None for a Wan's, and where it does not say."""
    classes = stated.get("architectures", [])
    classes = [stated.get("_class_name"), *(classes if isinstance(classes, list) else [classes])]
    others = []
    for name in classes:
        if name is None or name in _WAN_CLASSES:
            continue
        refuse_relative(name, "_class_name", file)
        others.append(brief(name))
    kind = stated.get("model_type")
    if kind in _RELATED_TYPES:
        raise BadRequest(_unread(file, f"model_type {brief(kind)}", "a relative of Wan"))
    if others:
        return f"another model ({', '.join(others)})"
    if "_class_name" not in stated and kind is not None and _is_unknown_type(kind):
        return f"another model (model_type {brief(kind)})"
    return None


def _is_unknown_type(kind: object) -> bool:
    return not isinstance(kind, str) or kind not in _MODEL_TYPES


def refuse_relative(name: object, field: str, file: Path) -> None:
    """Raise BadRequest when a class is of a relative of Wan, which has no graph here."""
    lower = name.lower() if isinstance(name, str) else ""
    is_part = "autoencoder" in lower or "scheduler" in lower
    for part, whose in _RELATIVES:
        if part in lower and not is_part:
            raise BadRequest(_unread(file, f"{field} {brief(name)}", whose))


def _unread(file: Path, statement: str, whose: str) -> str:
    return (
        f"{printable(file)} has {statement}: that is {whose}, which is not read yet; take a plain "
        f"Wan, or if the file is not of this model, delete it"
    )


def settings(stated: Mapping[str, Any], dim: int, file: Path) -> tuple[int, int, float]:
    """num_heads, text_len and eps, which no tensor tells, from config.json or their defaults.

    Raises BadRequest, naming the file, when one of them cannot be meant.
    """
    name = "num_attention_heads" if "num_attention_heads" in stated else "num_heads"
    heads = stated.get(name, max(1, dim // HEAD_DIM))
    text_len, eps = stated.get("text_len", 512), stated.get("eps", 1e-6)
    for field, value, largest in ((name, heads, dim), ("text_len", text_len, MAX_TEXT_LEN)):
        if type(value) is not int or not 1 <= value <= largest:
            raise BadRequest(
                f"{printable(file)} has {field} {brief(value)}: expected from 1 to {largest}"
            )
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise BadRequest(f"{printable(file)} has eps {brief(eps)}: expected a number from 0 to 1")
    if dim % heads:
        raise BadRequest(
            f"{printable(file)} has {name} {heads}, but the tensors have dim {dim}, which that "
            f"does not divide: put this model's own config.json there, or delete it"
        )
    return heads, text_len, eps


def check_config(
    stated: Mapping[str, Any], config: WanConfig, file: Path, *, is_quantised: bool = False
) -> None:
    """Hold everything that config.json states against the config that follows from the tensors.

    Warns of fields that are not known. Raises BadRequest, naming the field and both values,
    when something stated is otherwise, and when heads are not 128 wide by what may be another's.
    """
    _check_quantisation(stated.get("quantization_config"), file, is_quantised)
    unknown = []
    expected = _expected(config)
    for field, value in stated.items():
        allowed = expected.get(field)
        if field in _OF_STREAMS:
            _check_of_streams(field, value, config, file)
        elif whose := _RELATIVE_FIELDS.get(field):
            if value not in _NOTHING:
                raise BadRequest(_unread(file, f"{field} {brief(value)}", whose))
        elif allowed is None:
            unknown += [] if field in _IGNORED or field.startswith("_") else [field]
        elif not any(type(value) is type(right) and value == right for right in allowed):
            right = " or ".join(map(brief, allowed))
            raise BadRequest(
                f"{printable(file)} has {field} {brief(value)}, but the tensors are of a Wan with "
                f"{right}: put this model's own config.json there"
            )
    if config.head_dim != HEAD_DIM and not _is_a_wans(stated):
        raise BadRequest(
            f"{printable(file)} has num_heads {config.num_heads}, which would make heads of "
            f"{config.head_dim}, and does not say that it is a Wan's, whose heads are {HEAD_DIM} "
            f'wide: delete it, or add "_class_name": "WanModel" if it is'
        )
    if unknown:
        names = ", ".join(printable(name, 40) for name in unknown[:6])
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        warnings.warn(
            f"{printable(file)} states {names}{more}, which no Wan known here has: not used",
            WanExportWarning,
            stacklevel=2,
        )


def _check_of_streams(field: str, value: object, config: WanConfig, file: Path) -> None:
    """Raise BadRequest for what only a causal Wan's config states, in that of another."""
    if config.family != SELF_FORCING and value not in _NOTHING:
        raise BadRequest(
            f"{printable(file)} has {field} {brief(value)}, as a causal Wan: add _class_name "
            f"CausalWanModel if it is one, or delete it"
        )


def _check_quantisation(stated: object, file: Path, is_quantised: bool) -> None:
    """Refuse a method of quantisation other than ModelOpt's fp8, and one that the tensors lack."""
    if stated in _NOTHING:
        return
    fields = stated if isinstance(stated, dict) else {}
    method, algorithm = fields.get("quant_method"), str(fields.get("quant_algo", "FP8"))
    if method != "modelopt" or not algorithm.startswith("FP8"):
        raise BadRequest(
            f"{printable(file)} has quantization_config {brief(method)} {brief(algorithm)}, which "
            f"is not read: expected modelopt's FP8; take the fp32, bf16 or fp16 model"
        )
    if not is_quantised:
        raise BadRequest(
            f"{printable(file)} has a quantization_config, but no tensor beside it is quantised: "
            f"put this model's own config.json there, or delete it"
        )


def _is_a_wans(stated: Mapping[str, Any]) -> bool:
    """Whether a config says that it is a Wan's; its sizes were compared with the tensors before."""
    sizes = ({"dim", "ffn_dim", "num_layers"}, {"num_attention_heads", "attention_head_dim"})
    return (
        stated.get("_class_name") in _WAN_CLASSES
        or stated.get("model_type") in _MODEL_TYPES
        or any(names <= stated.keys() for names in sizes)
    )


def _expected(config: WanConfig) -> dict[str, tuple[Any, ...]]:
    """The values that each field of a plain Wan's config may have for this model."""
    has_image = config.image_tokens > 0
    return {
        "dim": (config.dim,),
        "ffn_dim": (config.ffn_dim,),
        "num_heads": (config.num_heads,),
        "num_attention_heads": (config.num_heads,),
        "attention_head_dim": (config.head_dim,),
        "num_layers": (config.num_layers,),
        "in_dim": (config.in_channels,),
        "in_channels": (config.in_channels,),
        "out_dim": (config.out_channels,),
        "out_channels": (config.out_channels,),
        "text_dim": (config.text_dim,),
        "text_len": (config.text_len,),
        "freq_dim": (config.freq_dim,),
        "eps": (config.eps,),
        "patch_size": ([1, 2, 2],),
        "qk_norm": (True, "rms_norm_across_heads"),
        "cross_attn_norm": (True,),
        "window_size": ([-1, -1],),
        "image_dim": (IMAGE_DIM if has_image else None,),
        "added_kv_proj_dim": (config.dim if has_image else None,),
        "pos_embed_seq_len": (514 if config.image_tokens == 514 else None,),
        "model_type": tuple(_types_of(config)),
        "_class_name": _WAN_CLASSES if config.family == SELF_FORCING else _PLAIN_CLASSES,
    }


def _types_of(config: WanConfig) -> list[str]:
    found = (config.condition_channels, config.image_tokens, config.family == "ti2v")
    return [name for name, kinds in _MODEL_TYPES.items() if found in kinds]


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline of diffusers, empty when there is none.

    Raises WanExportError when it is damaged, of another pipeline or names another transformer.
    """
    file = folder / "model_index.json"
    stated = read_object(file)
    _check_class(stated.get("_class_name"), _PIPELINES, "_class_name", file)
    for part in ("transformer", "transformer_2"):
        value = stated.get(part)
        if value is None or value == [None, None]:
            continue
        if not isinstance(value, list) or len(value) != 2:
            raise BadRequest(
                f"{printable(file)} has {part} {brief(value)}: expected a library and a class"
            )
        _check_class(value[1], _WAN_CLASSES, part, file)
    return stated


def _check_class(name: object, expected: tuple[str, ...], field: str, file: Path) -> None:
    if name is None or name in expected:
        return
    refuse_relative(name, field, file)
    raise BadRequest(
        f"{printable(file)} has {field} {brief(name)}: expected {' or '.join(expected)}"
    )


def boundary_of(index: Mapping[str, Any], folder: Path) -> float | None:
    """Where the experts meet, as model_index.json states it.

    Raises BadRequest when that is no fraction.
    """
    boundary = index.get("boundary_ratio")
    if boundary is not None and not (isinstance(boundary, float) and 0 < boundary < 1):
        raise BadRequest(
            f"{printable(folder)}/model_index.json has boundary_ratio {brief(boundary)}: expected "
            f"one from 0 to 1, both excluded, or null for a model without experts"
        )
    return boundary
