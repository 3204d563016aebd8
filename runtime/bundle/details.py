"""What each backend's engines record of themselves that decides how they are opened."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from packaging.version import InvalidVersion, Version

from wanexport.runtime.decode import Count, Name
from wanexport.runtime.program import MOMENTS, WHOLE, Program
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_config import EXPERTS


class Details(Protocol):
    """The typed details of one backend's engines."""

    def fault(
        self, backend: str, target: Mapping[str, str], calls: Sequence[str], files: Collection[str]
    ) -> str:
        """What a record of these details lacks or has wrong, in words; empty when nothing.

        calls are the names of the Program's calls, files the roles of the engine's files.
        """


@dataclass(frozen=True)
class OnnxDetails:
    """An ONNX graph: its operator of attention, and the bytes of one layer's scores in fp32."""

    attention: Name = "native"
    attention_score_bytes: Count = 0

    def fault(
        self, backend: str, target: Mapping[str, str], calls: Sequence[str], files: Collection[str]
    ) -> str:
        """See Details."""
        return _missing(calls, files)


@dataclass(frozen=True)
class AotiDetails:
    """AOTInductor packages: the kernel of each kind of attention."""

    attention: dict[Name, Name] = field(default_factory=dict)

    def fault(
        self, backend: str, target: Mapping[str, str], calls: Sequence[str], files: Collection[str]
    ) -> str:
        """See Details."""
        return _missing(calls, files)


@dataclass(frozen=True)
class VaeDetails:
    """AOTInductor packages of a VAE: its sizes, and the kernel of each kind of attention."""

    sizes: VaeConfig
    attention: dict[Name, Name] = field(default_factory=dict)

    def fault(
        self, backend: str, target: Mapping[str, str], calls: Sequence[str], files: Collection[str]
    ) -> str:
        """See Details."""
        return _missing(calls, files)


@dataclass(frozen=True)
class TensorRtDetails:
    """TensorRT plans: whether they serve newer GPUs and versions than those of the build."""

    hardware_compatible: bool = False
    version_compatible: bool = False

    def fault(
        self, backend: str, target: Mapping[str, str], calls: Sequence[str], files: Collection[str]
    ) -> str:
        """See Details."""
        if not re.fullmatch(r"sm[0-9]{1,4}", target.get("arch", "")):
            return "it is for no GPU's architecture"
        if not _is_version(target.get(backend, "")):
            return "it is for no version of TensorRT"
        if target.get("device") != "cuda":
            return f"it is for device {target.get('device')}"
        # Only of a step that is all of a Program may each expert have a plan of its own.
        if WHOLE in files or tuple(calls) != (WHOLE,):
            return _missing(calls, files)
        return "" if _OWN_PLANS <= set(files) else "it has no plan for an expert"


class Kind(NamedTuple):
    """What the manifest holds of a backend's engines.

    `details` is their type, `files` are roles beside those that are named as the Program's calls.
    The Program of one that `is_whole` is one call.
    """

    details: type[OnnxDetails] | type[AotiDetails] | type[VaeDetails] | type[TensorRtDetails]
    is_whole: bool
    files: frozenset[str] = frozenset()


_OWN_PLANS = frozenset(f"{WHOLE}-{expert}" for expert in EXPERTS)
_LAYERS = "layers"  # the role of a list of layers; the plan's name follows, but for a step's
_OF_PLANS = _OWN_PLANS | {_LAYERS, *(f"{_LAYERS}-{moment}" for moment in MOMENTS)}
KINDS = {
    "onnx": Kind(OnnxDetails, True),
    "aoti": Kind(AotiDetails, False, frozenset({"flash_attention"})),
    "tensorrt": Kind(TensorRtDetails, True, _OF_PLANS),
    "tensorrt-rtx": Kind(TensorRtDetails, True, _OF_PLANS),
}
VAE_KINDS = {"aoti": Kind(VaeDetails, False)}


def unknown_file(kind: Kind, program: Program, files: Collection[str]) -> str:
    """The role of a file that engines of a kind do not have; empty when there is none."""
    known = {*program.functions} | kind.files
    return next((role for role in files if role not in known), "")


def layers_role(plan: str) -> str:
    """The role of the file that lists a plan's layers."""
    return _LAYERS if is_plan_of_step(plan) else f"{_LAYERS}-{plan}"


def is_plan(role: str) -> bool:
    """Whether a file of this role is a plan."""
    return is_plan_of_step(role) or role in MOMENTS


def is_plan_of_step(role: str) -> bool:
    """Whether a file of this role is a plan of a step: one for all, or with an expert's weights."""
    return role == WHOLE or role.startswith(f"{WHOLE}-")


def _is_version(text: str) -> bool:
    """Whether a text is a version of a package, as 10.16.1.11 or 10.14.1.48.post1."""
    try:
        return len(text) <= 100 and bool(Version(text).release)
    except InvalidVersion:
        return False


def _missing(calls: Sequence[str], files: Collection[str]) -> str:
    """That a call's file is not there, in words."""
    missing = [call for call in calls if call not in files]
    return f"it has no file for its call {missing[0]}" if missing else ""
