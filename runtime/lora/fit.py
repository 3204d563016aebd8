"""Find what each tensor of a LoRA changes in a model of given shapes, and name what has no place.

Every tensor is a part of a change, or listed with the reason why it is none.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor

from wanexport.runtime.errors import printable
from wanexport.runtime.lora.kinds import (
    ADAPTERS,
    DIFFERENCES,
    LORA_BIAS,
    LOW_RANK,
    Kind,
    Shape,
    decomposed,
    magnitude_fits,
)
from wanexport.runtime.lora.names import flat, targets
from wanexport.runtime.lora.read import FLOATS, Lora, LoraTensor, Values

Shapes = Mapping[str, Shape]
_Roles = Mapping[str, LoraTensor]
_MAGNITUDES = ("magnitude", "dora_scale")


@dataclass(frozen=True)
class Change:
    """What one LoRA makes of one parameter by tensors of one kind."""

    kind: Kind
    factors: Mapping[str, LoraTensor]
    scale: float  # alpha / rank
    magnitude: LoraTensor | None = None

    @property
    def label(self) -> str:
        """The kind, for counts."""
        return f"{self.kind.name} with DoRA" if self.magnitude else self.kind.name

    @property
    def tensors(self) -> tuple[LoraTensor, ...]:
        """All that is read for it."""
        return (*self.factors.values(), *([self.magnitude] if self.magnitude else []))

    def applied(self, weight: Tensor, strength: float, values: Values) -> Tensor:
        """W + strength * scale * delta, of fp32 and on the weight's device.

        With DoRA, W + strength * (DoRA(W + scale * delta) - W), as ComfyUI has it for strengths
        other than 1 (`comfy/weight_adapter/base.py`); at 1 it is what PEFT merges.
        """
        read = {role: values.tensor(one) for role, one in self.factors.items()}
        on_device = {role: one.to(weight.device).float() for role, one in read.items()}
        delta = self.kind.delta(on_device).reshape(weight.shape)
        if self.magnitude is None:
            return weight + (strength * self.scale) * delta
        magnitude = values.tensor(self.magnitude).to(weight.device).float()
        if self.magnitude.role == "magnitude":  # PEFT's are of rows, whatever their shape
            magnitude = magnitude.flatten()
        changed = decomposed(weight + self.scale * delta, magnitude)
        return changed if strength == 1 else weight + strength * (changed - weight)


@dataclass(frozen=True)
class Unfit:
    """A tensor of a LoRA file that changes nothing, and why."""

    key: str
    reason: str


@dataclass
class Fit:
    """What a LoRA changes in a model, and what of it has no place there."""

    changes: dict[str, list[Change]] = field(default_factory=dict)  # by parameter
    unfit: list[Unfit] = field(default_factory=list)
    alone: int = 0  # alphas of modules that have no factors
    other_shapes: dict[str, Shape] = field(default_factory=dict)  # of changes that do not fit

    def refuse(self, tensors: Iterable[LoraTensor], reason: str) -> None:
        """List tensors as unfit."""
        self.unfit += [Unfit(tensor.key, reason) for tensor in tensors]


def fit(lora: Lora, shapes: Shapes) -> Fit:
    """Find the changes of a LoRA in a model that has these parameters, by official names.

    Raises BadRequest for an alpha that is no finite number, BundleError for a file that changed.
    """
    found = Fit()
    modules = _by_module(lora, targets(shapes), found)
    with lora.opened() as values:
        for module, roles in modules.items():
            _Module(module, roles, lora, shapes, values, found).fit()
    return found


def _by_module(
    lora: Lora, known: Mapping[str, str], found: Fit
) -> dict[str, dict[str, LoraTensor]]:
    """The tensors by the official names of their modules, and by role."""
    modules: dict[str, dict[str, LoraTensor]] = {}
    for tensor in lora.tensors:
        name = known.get(flat(tensor.module), "")
        roles = modules.setdefault(name, {}) if name else {}
        if reason := _why_not(tensor, name, roles):
            found.refuse([tensor], reason)
        else:
            roles[tensor.role] = tensor
    return modules


def _why_not(tensor: LoraTensor, module: str, roles: _Roles) -> str:
    """Why a tensor has no place, seen alone; empty when it may have one."""
    if not tensor.role:
        return "is of no kind that is read"
    if not module:
        return "is of a module that this model lacks"
    if not prod(tensor.entry.shape):
        return "is empty"
    if tensor.entry.dtype not in FLOATS and tensor.role != "alpha":
        return f"is {tensor.entry.dtype}, expected {', '.join(FLOATS)}"
    if tensor.role in roles:
        return f"stands for the same as {printable(roles[tensor.role].key)}"
    return ""


@dataclass(frozen=True)
class _Module:
    """The tensors of one module, and where what becomes of them is written."""

    name: str
    roles: dict[str, LoraTensor]
    lora: Lora
    shapes: Shapes
    values: Values
    found: Fit

    def fit(self) -> None:
        """Make changes of the tensors: adapters first, then what is added as it is."""
        adapters = [change for kind in ADAPTERS if (change := self._change(kind))]
        magnitude = self._magnitude(adapters)
        for change in adapters:
            self._add(replace(change, magnitude=magnitude))
        if "alpha" in self.roles and not adapters:
            self._fit_alpha(self.roles["alpha"])
        self._fit_bias([change for change in adapters if change.kind is LOW_RANK])
        for kind in DIFFERENCES:
            if change := self._change(kind):
                self._add(change)

    def _fit_alpha(self, alpha: LoraTensor) -> None:
        """An alpha of a module without factors is of nothing, as in lightx2v's newest files."""
        factors = frozenset().union(*(kind.roles for kind in ADAPTERS))
        if factors & self.roles.keys():
            self.found.refuse([alpha], "is an alpha without fitting factors")
            return
        self.values.number(alpha)  # which refuses what is no number
        self.found.alone += 1

    def _fit_bias(self, low_rank: list[Change]) -> None:
        """The bias that PEFT trains beside a low rank has its scale."""
        if bias := self.roles.get("up_bias"):
            if not low_rank:
                self.found.refuse([bias], "is a bias without fitting factors")
            elif change := self._change(LORA_BIAS):
                self._add(replace(change, scale=low_rank[0].scale))

    def _add(self, change: Change) -> None:
        parameter = self._parameter(change.kind)
        self.found.changes.setdefault(parameter, []).append(change)

    def _parameter(self, kind: Kind) -> str:
        """What tensors of a kind change; some files name the parameter itself."""
        whole = self.name in self.shapes and kind.target == "weight"
        return self.name if whole else f"{self.name}.{kind.target}"

    def _change(self, kind: Kind) -> Change | None:
        """The change by tensors of a kind; None where there are none, or they do not fit."""
        present = kind.roles & self.roles.keys()
        if not present:
            return None
        needed = kind.needed(present)
        self.found.refuse(self._tensors(present - needed), f"has no place in a {kind.name}")
        if not present >= needed:
            beside = " and ".join(sorted(needed - present))
            self.found.refuse(self._tensors(present & needed), f"has no {beside} beside it")
            return None
        factors = {role: self.roles[role] for role in sorted(needed)}
        if reason := self._misfit(kind, factors):
            self.found.refuse(factors.values(), reason)
            return None
        return Change(kind, factors, self._scale(kind, factors))

    def _tensors(self, roles: Collection[str]) -> list[LoraTensor]:
        return [self.roles[role] for role in sorted(roles)]

    def _misfit(self, kind: Kind, factors: _Roles) -> str:
        """Why factors do not fit one another or the parameter; empty when they do."""
        parameter = self._parameter(kind)
        if parameter not in self.shapes:
            return f"changes {parameter}, which this model lacks"
        shape, own = self.shapes[parameter], _shapes(factors)
        try:
            made = kind.shape(own)
        except ValueError:
            sizes = ", ".join(f"{role} {list(one)}" for role, one in own.items())
            return f"is of a {kind.name} whose parts do not fit each other: {sizes}"
        if not _alike(made, shape):
            self.found.other_shapes[parameter] = made
            return f"changes {parameter} as one of {list(made)}, here it is {list(shape)}"
        if (rank := kind.rank(own)) > max(shape[0], prod(shape[1:])):
            return f"has the rank {rank}, more than {parameter} of {list(shape)} can have"
        return ""

    def _scale(self, kind: Kind, factors: _Roles) -> float:
        """alpha / rank; 1 without an alpha, and where it does not count. An alpha of 0 is 0.

        ComfyUI and kohya multiply by an alpha of 0, LightX2V takes it as absent.
        """
        adapter = kind in ADAPTERS
        alpha = self.roles.get("alpha") if adapter else None
        value = self.values.number(alpha) if alpha else None  # which refuses NaN
        rank = kind.rank(_shapes(factors))
        if not rank:
            return 1.0
        if value is not None:
            return value / rank
        if self.lora.alphas and kind is LOW_RANK:
            return self.lora.alphas.scale(factors["down"].module, rank)
        return 1.0

    def _magnitude(self, adapters: list[Change]) -> LoraTensor | None:
        """The magnitudes of the module's one adapter; others are listed as unfit."""
        present = self._tensors([role for role in _MAGNITUDES if role in self.roles])
        if len(present) == len(adapters) == 1:
            weight = self.shapes[self._parameter(adapters[0].kind)]
            shape = present[0].entry.shape
            if present[0].role == "magnitude":  # PEFT's, which are of rows in every shape
                shape = (prod(shape),)
            if magnitude_fits(shape, weight):
                return present[0]
            self.found.refuse(present, f"has {list(shape)} magnitudes for {list(weight)}")
        else:
            self.found.refuse(present, "is a magnitude (DoRA) without one adapter that fits")
        return None


def _shapes(tensors: _Roles) -> dict[str, Shape]:
    return {role: tensor.entry.shape for role, tensor in tensors.items()}


def _alike(made: Shape, shape: Shape) -> bool:
    """Whether a change has a parameter's shape, but for ones, or as a matrix of its rows."""
    rows = (shape[0], prod(shape[1:]))
    return _without_ones(made) in (_without_ones(shape), _without_ones(rows))


def _without_ones(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
