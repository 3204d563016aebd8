"""Each kind of change is what plain fp64 maths says, for every strength."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.runtime.lora.tiny import (
    FFN,
    SHAPES,
    Q,
    base,
    is_close,
    merged,
    pair,
    random,
    stack,
    wide,
)

PATCH = "patch_embedding"


def dora64(weight: Any, magnitude: Any, axes: tuple[int, ...]) -> Any:
    return weight * magnitude / np.sqrt((weight**2).sum(axis=axes, keepdims=True))


def product(tensors: dict[str, Tensor], module: str) -> Any:
    return wide(tensors[f"{module}.lora_B.weight"]) @ wide(tensors[f"{module}.lora_A.weight"])


@pytest.mark.parametrize("strength", [1.0, 0.3, -1.5, 0.0])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5), (0.0, 0.0), (-8.0, -2.0)])
def test_a_low_rank_is_added_by_strength_and_alpha_over_rank(
    strength: float, alpha: float | None, scale: float, tmp_path: Path
) -> None:
    tensors = pair(FFN)
    expected = wide(base(f"{FFN}.weight")) + strength * scale * product(tensors, FFN)
    if alpha is not None:
        tensors[f"{FFN}.alpha"] = torch.tensor(alpha)
    assert is_close(merged(tmp_path, f"{FFN}.weight", tensors, strength=strength), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_alpha_is_read_in_every_dtype(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = pair(Q) | {f"{Q}.alpha": torch.full(shape, 3, dtype=dtype)}
    expected = wide(base(f"{Q}.weight")) + 0.75 * product(tensors, Q)
    assert is_close(merged(tmp_path, f"{Q}.weight", tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_half_precision_are_multiplied_in_full(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {key: value.to(dtype) for key, value in pair(Q).items()}
    expected = wide(base(f"{Q}.weight")) + product(tensors, Q)
    assert is_close(merged(tmp_path, f"{Q}.weight", tensors), expected)


@pytest.mark.parametrize("as_matrix", [False, True])
def test_the_patch_embedding_takes_a_low_rank_of_convolutions_or_of_matrices(
    as_matrix: bool, tmp_path: Path
) -> None:
    tensors = pair(PATCH)
    down, up = (tensors[f"{PATCH}.lora_{x}.weight"] for x in "AB")
    expected = wide(base(f"{PATCH}.weight")) + np.einsum(
        "or,rcthw->octhw", wide(up)[:, :, 0, 0, 0], wide(down)
    )
    if as_matrix:
        tensors = {key: value.flatten(1) for key, value in tensors.items()}
    assert is_close(merged(tmp_path, f"{PATCH}.weight", tensors), expected)


def test_a_middle_factor_is_the_kernel_of_three_convolutions(tmp_path: Path) -> None:
    """The oracle is the convolutions themselves, one after the other."""
    down, mid, up = random(3, 16, 1, 1, 1), random(3, 3, 1, 2, 2), random(16, 3, 1, 1, 1)
    names = ("lora_down", "lora_mid", "lora_up")
    tensors = {f"{PATCH}.{name}.weight": one for name, one in zip(names, (down, mid, up))}
    tensors[f"{PATCH}.alpha"] = torch.tensor(1.5)
    x = random(1, 16, 1, 2, 2, seed=7).double()
    kernel = base(f"{PATCH}.weight")
    through = torch.conv3d(x, kernel.double()) + 0.5 * torch.conv3d(
        torch.conv3d(torch.conv3d(x, down.double()), mid.double()), up.double()
    )
    found = merged(tmp_path, f"{PATCH}.weight", tensors)
    assert torch.conv3d(x, found.double()).allclose(through, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("suffix", "parameter"),
    [
        ("blocks.0.norm3.diff", "blocks.0.norm3.weight"),
        ("blocks.0.self_attn.norm_k.diff", "blocks.0.self_attn.norm_k.weight"),
        ("patch_embedding.diff", "patch_embedding.weight"),
        ("head.head.diff", "head.head.weight"),
        ("head.head.diff_b", "head.head.bias"),
        (f"{Q}.diff_b", f"{Q}.bias"),
        ("blocks.0.norm3.diff_b", "blocks.0.norm3.bias"),
        ("blocks.1.diff_m", "blocks.1.modulation"),
        ("blocks.1.modulation.diff", "blocks.1.modulation"),
        ("head.diff_m", "head.modulation"),
        ("head.modulation.diff", "head.modulation"),
        ("blocks.0.norm3.w_norm", "blocks.0.norm3.weight"),
        ("blocks.0.norm3.b_norm", "blocks.0.norm3.bias"),
        ("transformer.scale_shift_table.diff", "head.modulation"),
        ("transformer.blocks.1.scale_shift_table.diff", "blocks.1.modulation"),
    ],
)
def test_differences_are_added_by_strength_alone(
    suffix: str, parameter: str, tmp_path: Path
) -> None:
    difference = random(*SHAPES[parameter], seed=9)
    expected = wide(base(parameter)) - 0.5 * wide(difference)
    assert is_close(merged(tmp_path, parameter, {suffix: difference}, strength=-0.5), expected)


def test_a_bias_beside_a_low_rank_has_its_scale(tmp_path: Path) -> None:
    bias = random(16)
    tensors = pair(Q) | {f"{Q}.lora_B.bias": bias, f"{Q}.alpha": torch.tensor(2.0)}
    expected = wide(base(f"{Q}.bias")) + 2 * 0.5 * wide(bias)
    assert is_close(merged(tmp_path, f"{Q}.bias", tensors, strength=2), expected)


def test_a_low_rank_and_a_difference_of_one_weight_both_count(tmp_path: Path) -> None:
    difference = random(16, 16, seed=5)
    tensors = pair(Q) | {f"{Q}.diff": difference}
    expected = wide(base(f"{Q}.weight")) + 2 * (product(tensors, Q) + wide(difference))
    assert is_close(merged(tmp_path, f"{Q}.weight", tensors, strength=2), expected)


@pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("dora_scale", (24, 1), (1,)),
        ("dora_scale", (24,), (1,)),
        ("dora_scale", (1, 16), (0,)),
        ("lora_magnitude_vector", (24,), (1,)),
        ("lora_magnitude_vector.default.weight", (24,), (1,)),
    ],
)
def test_a_dora_gives_rows_or_columns_their_norms(
    name: str, shape: tuple[int, ...], axes: tuple[int, ...], strength: float, tmp_path: Path
) -> None:
    magnitude = random(*shape).abs()
    tensors = pair(FFN) | {f"{FFN}.{name}": magnitude, f"{FFN}.alpha": torch.tensor(2.0)}
    weight = wide(base(f"{FFN}.weight"))
    against = wide(magnitude).reshape((-1, 1) if axes == (1,) else (1, -1))
    changed = dora64(weight + 0.5 * product(tensors, FFN), against, axes)
    expected = weight + strength * (changed - weight)
    assert is_close(merged(tmp_path, f"{FFN}.weight", tensors, strength=strength), expected)


@pytest.mark.parametrize(("shape", "axes"), [((16, 1), (1,)), ((1, 16), (0,))])
def test_the_magnitudes_of_a_square_weight_tell_rows_from_columns(
    shape: tuple[int, ...], axes: tuple[int, ...], tmp_path: Path
) -> None:
    magnitude = random(*shape).abs()
    tensors = pair(Q) | {f"{Q}.dora_scale": magnitude}
    weight = wide(base(f"{Q}.weight")) + product(tensors, Q)
    expected = dora64(weight, wide(magnitude), axes)
    assert is_close(merged(tmp_path, f"{Q}.weight", tensors), expected)


def test_a_row_of_zeros_has_no_norm_to_replace(tmp_path: Path) -> None:
    up = torch.zeros(16, 4)
    tensors = pair(Q) | {f"{Q}.lora_B.weight": up, f"{Q}.dora_scale": torch.ones(16, 1)}
    found = stack(tmp_path, tensors).merge(f"{Q}.weight", torch.zeros(16, 16))
    assert (found == 0).all()


LOKR_WHOLE = {"w1": (2, 4), "w2": (12, 4)}
LOKR_SECOND = {"w1": (2, 4), "w2_a": (12, 3), "w2_b": (3, 4)}
LOKR_FIRST = {"w1_a": (2, 5), "w1_b": (5, 4), "w2": (12, 4)}
LOKR_BOTH = {"w1_a": (2, 3), "w1_b": (3, 4), "w2_a": (12, 3), "w2_b": (3, 4)}


@pytest.mark.parametrize(
    ("parts", "rank"), [(LOKR_WHOLE, 0), (LOKR_SECOND, 3), (LOKR_FIRST, 5), (LOKR_BOTH, 3)]
)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_lokr_is_a_kronecker_product_that_alpha_scales_unless_it_is_whole(
    parts: dict[str, tuple[int, ...]], rank: int, alpha: float | None, tmp_path: Path
) -> None:
    values = {role: random(*shape, seed=i) for i, (role, shape) in enumerate(parts.items())}
    tensors = {f"{FFN}.lokr_{role}": value for role, value in values.items()}
    sides = [
        wide(values[side])
        if side in values
        else wide(values[f"{side}_a"]) @ wide(values[f"{side}_b"])
        for side in ("w1", "w2")
    ]
    scale = alpha / rank if alpha and rank else 1
    if alpha:
        tensors[f"{FFN}.alpha"] = torch.tensor(alpha)
    expected = wide(base(f"{FFN}.weight")) - 0.5 * scale * np.kron(*sides)
    assert is_close(merged(tmp_path, f"{FFN}.weight", tensors, strength=-0.5), expected)


@pytest.mark.parametrize("how", ["whole", "core", "matrix"])
def test_a_lokr_of_a_convolution_has_its_kernel_in_the_second_side(
    how: str, tmp_path: Path
) -> None:
    first, core = random(4, 2), random(3, 3, 1, 2, 2)
    a, b = random(3, 4), random(3, 8)
    second = np.einsum("ijthw,io,jc->octhw", wide(core), wide(a), wide(b))
    tensors = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    if how != "core":
        core_free = torch.from_numpy(second).float()
        second = wide(core_free)
        tensors = {"lokr_w1": first, "lokr_w2": core_free}
    if how == "matrix":
        tensors["lokr_w2"] = core_free.flatten(1)
    delta = np.einsum("ab,cdthw->acbdthw", wide(first), second).reshape(16, 16, 1, 2, 2)
    expected = wide(base(f"{PATCH}.weight")) + delta
    named = {f"{PATCH}.{key}": value for key, value in tensors.items()}
    assert is_close(merged(tmp_path, f"{PATCH}.weight", named), expected)


def loha(module: str, rank: int = 3) -> dict[str, Tensor]:
    out, columns = SHAPES[f"{module}.weight"]
    shapes = {"w1_a": (out, rank), "w1_b": (rank, columns)}
    shapes |= {"w2_a": (out, rank), "w2_b": (rank, columns)}
    return {
        f"{module}.hada_{role}": random(*shape, seed=i)
        for i, (role, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("with_magnitude", [False, True])
def test_a_loha_is_the_elementwise_product_of_two_products(
    with_magnitude: bool, tmp_path: Path
) -> None:
    tensors = loha(FFN)
    a1, b1, a2, b2 = (wide(one) for one in tensors.values())
    weight = wide(base(f"{FFN}.weight"))
    expected = weight + 2 * (a1 @ b1) * (a2 @ b2)
    tensors[f"{FFN}.alpha"] = torch.tensor(6.0)
    if with_magnitude:
        magnitude = random(24, 1).abs()
        tensors[f"{FFN}.dora_scale"] = magnitude
        expected = dora64(expected, wide(magnitude), (1,))
    assert is_close(merged(tmp_path, f"{FFN}.weight", tensors), expected)


def test_a_loha_of_a_convolution_has_a_core_on_each_side(tmp_path: Path) -> None:
    parts = [random(3, 3, 1, 2, 2, seed=1), random(3, 16, seed=2), random(3, 16, seed=3)]
    parts += [random(3, 3, 1, 2, 2, seed=4), random(3, 16, seed=5), random(3, 16, seed=6)]
    names = ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")
    tensors = {f"{PATCH}.hada_{name}": one for name, one in zip(names, parts)}
    first, second = (np.einsum("ijthw,io,jc->octhw", *map(wide, parts[i : i + 3])) for i in (0, 3))
    expected = wide(base(f"{PATCH}.weight")) + first * second
    assert is_close(merged(tmp_path, f"{PATCH}.weight", tensors), expected)
