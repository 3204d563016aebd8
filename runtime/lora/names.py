"""The names of a LoRA's tensors: what each stands for, under every spelling that programs write.

A name is a prefix, a module of the model, and a suffix that tells the tensor's role. Modules are
found among those that the model has, never by taking a name apart.
"""

import re
from collections.abc import Mapping

from wanexport.runtime.wan_keys import diffusers_name

SECOND_EXPERT = "transformer_2."  # of diffusers' pipelines with two
_PREFIX = re.compile(
    r"((model\.)?diffusion_model\.|base_model\.model\.|transformer(_2)?\.|pipe\.dit\."
    r"|lora_unet__?|lycoris_)*"
)
_ADAPTER = r"(\.(?!weight$|bias$)[\w-]+)?"  # PEFT's name for one of several
_WEIGHT = _ADAPTER + r"(\.weight)?"
_ROLES = (
    (rf"\.lora(_A|_down|\.down){_WEIGHT}", "down"),
    (rf"\.lora(_B|_up|\.up){_WEIGHT}", "up"),
    (rf"\.lora(_B|_up|\.up){_ADAPTER}\.bias", "up_bias"),
    (r"\.lora_mid(\.weight)?", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (rf"\.lora_magnitude_vector{_WEIGHT}", "magnitude"),
    *((rf"\.lokr_{part}{_ADAPTER}", part) for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")),
    (rf"\.lokr_t2{_ADAPTER}", "t2"),
    *((rf"\.hada_{part}{_ADAPTER}", f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *((rf"\.hada_{part}{_ADAPTER}", f"hada_{part}") for part in ("t1", "t2")),
    *((rf"\.{role}", role) for role in ("diff", "diff_b", "diff_m", "w_norm", "b_norm")),
)
_SUFFIXES = tuple((re.compile(f"(.*?){pattern}"), role) for pattern, role in _ROLES)
# What a file with such a name is or does: leaving the tensor out would be another LoRA.
_OTHER_KINDS = (
    (r"\.set_weight$", "replaces whole weights (set_weight)"),
    (r"\.reshape_weight$", "changes the shapes of weights, as control LoRAs do (reshape_weight)"),
    (r"\.(oft|boft)_", "is of OFT or BOFT, which rotate weights"),
    (r"\.[ab][12]\.weight$", "is of GLoRA"),
    (r"(^|\.)[qkv]_loras\.", "is of Stand-In, which adds to the graph"),
    (r"(^|\.)(dwpose|randomref)_embedding", "is of UniAnimate, which adds to the graph"),
)


def split(key: str) -> tuple[str, str] | None:
    """The module's name without its prefix, and the role; None for a name without a known role."""
    bare = without_prefix(key)
    for pattern, role in _SUFFIXES:
        if match := pattern.fullmatch(bare):
            return match[1], role
    return None


def without_prefix(key: str) -> str:
    """The name without what programs put before the model's own."""
    match = _PREFIX.match(key)
    return key[match.end() :] if match else key


def other_kind(key: str) -> str:
    """What a file with this name is or does that is not read; empty for every other name."""
    return next((what for pattern, what in _OTHER_KINDS if re.search(pattern, key)), "")


def flat(name: str) -> str:
    """A name with underscores for dots, as kohya and LyCORIS write it."""
    return name.replace(".", "_")


def targets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Modules and parameters of the model: from their flat official and diffusers names.

    shapes has every parameter by its official name; so are the modules named that are found.
    """
    found = {}
    for parameter in shapes:
        for name in (parameter, diffusers_name(parameter)):
            found[flat(name)] = parameter
            if module := name.rpartition(".")[0]:
                found[flat(module)] = parameter.rpartition(".")[0]
    return found
