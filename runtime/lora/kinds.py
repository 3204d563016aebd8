"""The kinds of change that a LoRA makes to one parameter, and the arithmetic of each.

Formulas: peft 0.21 `tuners/{lora,lokr,loha}/layer.py`, which agrees with LyCORIS 3
`modules/{locon,lokr,loha}.py`. Products of matrices are taken in fp64 and rounded to fp32 once, so
that neither TF32 nor an autocast of the caller's reaches them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]
Factors = Mapping[str, Tensor]  # by role


@dataclass(frozen=True)
class Kind:
    """What the tensors of some roles make of one parameter of a module.

    `shape` is that of the delta, and raises ValueError for factors that do not fit each other.
    `rank` gives what alpha is divided by; 0: alpha does not count.
    """

    name: str
    target: str  # of the module
    roles: frozenset[str]
    needed: Callable[[Collection[str]], frozenset[str]]  # of the roles, by those that are there
    rank: Callable[[Mapping[str, Shape]], int]
    shape: Callable[[Mapping[str, Shape]], Shape]
    delta: Callable[[Factors], Tensor]


def _low_rank(factors: Factors) -> Tensor:
    """up @ down: [out, r] and [r, in, ...] to [out, in, ...]; with a mid, three convolutions.

    mid is [r, r, ...] with the kernel, which down then lacks (LyCORIS `LoConModule.make_weight`).
    """
    up, down = factors["up"].flatten(1), factors["down"]
    if "mid" in factors:
        return _tucker(factors["mid"], up.T, down.flatten(1))
    return _product(up, down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _lokr(factors: Factors) -> Tensor:
    """The Kronecker product of w1 [a, b] and w2 [c, d, ...], each whole or a product itself."""
    first = _lokr_side(factors, "w1")
    if "t2" in factors:
        second = _tucker(factors["t2"], factors["w2_a"], factors["w2_b"])
    else:
        second = _lokr_side(factors, "w2")
    first = first.reshape(*first.shape, *[1] * (second.dim() - first.dim()))
    return torch.kron(first, second.contiguous())


def _lokr_side(factors: Factors, name: str) -> Tensor:
    if name in factors:
        return factors[name]
    return _product(factors[f"{name}_a"], factors[f"{name}_b"])


def _loha(factors: Factors) -> Tensor:
    """The elementwise product of two products, each [out, r] @ [r, in] or with a core."""
    first, second = _loha_side(factors, 1), _loha_side(factors, 2)
    return first * second


def _loha_side(factors: Factors, number: int) -> Tensor:
    a, b = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    if (core := factors.get(f"hada_t{number}")) is not None:
        return _tucker(core, a, b)
    return _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.double(), b.double()).float()


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [i, j, ...], a [i, out] and b [j, in] to [out, in, ...] (LyCORIS `rebuild_tucker`)."""
    product = torch.einsum("ij...,ip,jr->pr...", core.double(), a.double(), b.double())
    return product.float()


def _flat(shape: Shape) -> Shape:
    """As a matrix of the rows."""
    if len(shape) < 2:
        raise ValueError("it is no matrix")
    return shape[0], prod(shape[1:])


def _product_shape(a: Shape, b: Shape) -> Shape:
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise ValueError("the matrices do not fit each other")
    return a[0], b[1]


def _tucker_shape(core: Shape, a: Shape, b: Shape) -> Shape:
    if len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]):
        raise ValueError("the core does not fit its factors")
    return (a[1], b[1], *core[2:])


def _low_rank_shape(shapes: Mapping[str, Shape]) -> Shape:
    up, down = _flat(shapes["up"]), _flat(shapes["down"])
    if "mid" in shapes:
        return _tucker_shape(shapes["mid"], up[::-1], down)
    _product_shape(up, down)
    return (up[0], *shapes["down"][1:])


def _lokr_shape(shapes: Mapping[str, Shape]) -> Shape:
    first = _lokr_side_shape(shapes, "w1")
    if "t2" in shapes:
        second = _tucker_shape(shapes["t2"], shapes["w2_a"], shapes["w2_b"])
    else:
        second = _lokr_side_shape(shapes, "w2")
    if len(first) > len(second):
        raise ValueError("the first side has more dimensions than the second")
    first += (1,) * (len(second) - len(first))
    return tuple(a * b for a, b in zip(first, second, strict=True))


def _lokr_side_shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name in shapes:
        return shapes[name]
    return _product_shape(shapes[f"{name}_a"], shapes[f"{name}_b"])


def _loha_shape(shapes: Mapping[str, Shape]) -> Shape:
    sides = []
    for number in (1, 2):
        a, b = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"]
        core = shapes.get(f"hada_t{number}")
        sides.append(_product_shape(a, b) if core is None else _tucker_shape(core, a, b))
    if sides[0] != sides[1]:
        raise ValueError("the two products have different shapes")
    return sides[0]


def _low_rank_needed(found: Collection[str]) -> frozenset[str]:
    return frozenset({"down", "up"} | ({"mid"} & set(found)))


def _lokr_needed(found: Collection[str]) -> frozenset[str]:
    """Each side whole, or its factors; a core needs the factors of w2."""
    first = {"w1"} if "w1" in found else {"w1_a", "w1_b"}
    if "t2" in found:
        return frozenset(first | {"t2", "w2_a", "w2_b"})
    return frozenset(first | ({"w2"} if "w2" in found else {"w2_a", "w2_b"}))


def _loha_needed(found: Collection[str]) -> frozenset[str]:
    """All factors; the cores are two or none."""
    cores = frozenset({"hada_t1", "hada_t2"})
    return _LOHA if cores & set(found) else _LOHA - cores


def _lokr_rank(shapes: Mapping[str, Shape]) -> int:
    """The rank of w2's factors, else of w1's; alpha does not count where both sides are whole."""
    return (shapes.get("w2_b") or shapes.get("w1_b") or (0,))[0]


def _one_tensor(name: str, role: str, target: str) -> Kind:
    """A tensor that is added as it is: alpha does not count (ComfyUI `comfy/lora.py`)."""
    roles = frozenset({role})
    return Kind(
        name, target, roles, lambda found: roles, lambda shapes: 0, lambda shapes: shapes[role],
        lambda factors: factors[role],
    )  # fmt: skip


_LOW_RANK = frozenset({"down", "up", "mid"})
_LOKR = frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"})
_LOHA = frozenset(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
# Those that an alpha scales, and that a magnitude (DoRA) can follow.
LOW_RANK = Kind(
    "low rank", "weight", _LOW_RANK, _low_rank_needed, lambda shapes: shapes["down"][0],
    _low_rank_shape, _low_rank,
)  # fmt: skip
ADAPTERS = (
    LOW_RANK,
    Kind("LoKr", "weight", _LOKR, _lokr_needed, _lokr_rank, _lokr_shape, _lokr),
    Kind(
        "LoHa",
        "weight",
        _LOHA,
        _loha_needed,
        lambda shapes: shapes["hada_w1_b"][0],
        _loha_shape,
        _loha,
    ),
)
LORA_BIAS = _one_tensor("lora_bias", "up_bias", "bias")
DIFFERENCES = (
    _one_tensor("diff", "diff", "weight"),
    _one_tensor("diff_b", "diff_b", "bias"),
    _one_tensor("diff_m", "diff_m", "modulation"),
    _one_tensor("w_norm", "w_norm", "weight"),
    _one_tensor("b_norm", "b_norm", "bias"),
)


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the weight with the norms of its rows replaced (peft `tuners/lora/variants.py`).

    A magnitude of [1, in, ...] is of the columns, as LyCORIS writes with `wd_on_out=False`; one of
    [out, ...] is of the rows. A row of zeros stays one.
    """
    kept = 0 if magnitude.shape[0] == weight.shape[0] else 1
    others = [i for i in range(weight.dim()) if i != kept]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=torch.float64)
    norm = torch.where(norm == 0, 1, norm)
    return weight * (magnitude.double().reshape(norm.shape) / norm).float()


def magnitude_fits(magnitude: Shape, weight: Shape) -> bool:
    """Whether the magnitudes are one a row or one a column of a weight."""
    if len(weight) < 2 or not magnitude:
        return False
    rows = (weight[0], *[1] * (len(magnitude) - 1))
    columns = (1, weight[1], *[1] * (len(weight) - 2))
    return magnitude in (rows, columns)
