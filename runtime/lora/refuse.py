"""Refuse a LoRA that does not fit a model, in one line with the likely reason."""

import re
from collections.abc import Mapping

from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.lora.fit import Fit, Shapes
from wanexport.runtime.lora.names import flat, targets, without_prefix
from wanexport.runtime.lora.read import Lora

_SHOWN = 4  # reasons in one line
_SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}
_OF_WIDTH = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo])\.weight")
_OF_IMAGES = re.compile(
    r"cross_attn[._][kv]_img|img_emb|add_[kv]_proj|norm_(added_k|k_img)|image_embedder"
)
_OF_TEXT = re.compile(r"(lora_te\d?_|text_encoders?\.)")


def refuse_unfit(lora: Lora, fit: Fit, shapes: Shapes, *, partial: bool) -> None:
    """Raise BadRequest where nothing of a LoRA fits, or with partial=False where not all does."""
    name = printable(lora.file.path)
    if not lora.tensors:
        raise BadRequest(f"{name} has no tensors: it is no LoRA")
    hint = _hint(lora, fit, shapes)
    if not fit.changes:
        raise BadRequest(f"{name} changes nothing in this model: {hint or _listed(fit)}")
    if fit.unfit and not partial:
        raise BadRequest(
            f"{len(fit.unfit)} of {len(lora.tensors)} tensors in {name} do not fit this model: "
            f"{_listed(fit)}{'; ' if hint else ''}{hint}; take a LoRA of this model, or leave "
            f"them out with --lora-partial"
        )


def _listed(fit: Fit) -> str:
    """The first reasons, each with its first tensor and how many more have it."""
    reasons: dict[str, list[str]] = {}
    for unfit in fit.unfit:
        reasons.setdefault(unfit.reason, []).append(unfit.key)
    shown = [_counted(keys, reason) for reason, keys in list(reasons.items())[:_SHOWN]]
    more = len(fit.unfit) - sum(len(keys) for keys in list(reasons.values())[:_SHOWN])
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _counted(keys: list[str], reason: str) -> str:
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{printable(keys[0])}{more} {reason}"


def _hint(lora: Lora, fit: Fit, shapes: Shapes) -> str:
    """The likely reason why tensors do not fit; empty where nothing tells one."""
    unfit = [without_prefix(one.key) for one in fit.unfit]
    known = targets(shapes)
    if not any(tensor.role for tensor in lora.tensors):
        return _without_roles(unfit, known)
    if "img_emb.proj.0.weight" not in shapes and any(map(_OF_IMAGES.search, unfit)):
        return "it is for a model with an image branch (I2V or FLF2V of Wan2.1), this one has none"
    if not any(flat(tensor.module) in known for tensor in lora.tensors):
        if all(map(_OF_TEXT.match, unfit)):
            return "it is of the text encoder alone, which LoRAs are not merged into"
        return f"it is of another model, none of its modules is of this one ({_listed(fit)})"
    return _size_hint(unfit, fit, shapes)


def _without_roles(names: list[str], known: Mapping[str, str]) -> str:
    if any(flat(name) in known for name in names):
        return "it holds whole weights: it is a checkpoint, which -m takes, and no LoRA"
    return f"it is no LoRA ({printable(names[0])} has no name of a LoRA's tensor)"


def _size_hint(unfit: list[str], fit: Fit, shapes: Shapes) -> str:
    """What tells a LoRA for a Wan of another width or depth."""
    for parameter, made in fit.other_shapes.items():
        if _OF_WIDTH.fullmatch(parameter) and len(made) > 1 and made[0] != shapes[parameter][0]:
            theirs, ours = (_width(size) for size in (made[0], shapes[parameter][0]))
            return f"it is for a Wan of width {theirs}, this one has {ours}"
    depth = 1 + max(_blocks(shapes), default=-1)
    needed = 1 + max(_blocks(unfit), default=-1)
    if needed > depth:
        return f"it is for a Wan of {needed} blocks, this one has {depth}"
    return ""


def _width(size: int) -> str:
    return f"{size} ({_SIZES[size]})" if size in _SIZES else str(size)


def _blocks(names: Mapping[str, object] | list[str]) -> list[int]:
    matches = (re.match(r"blocks[._](\d{1,6})[._]", name) for name in names)
    return [int(match[1]) for match in matches if match]
