"""The programs of two sizes that AOTInductor compiles are one, or the first difference is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.wan_reference import VARIANTS, small_config
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.exporter.backends.aoti import prove
from wanexport.exporter.backends.aoti.same import compare_programs
from wanexport.exporter.backends.backend import Request
from wanexport.graphs.graph import Graph
from wanexport.graphs.wan import WanModel
from wanexport.runtime.bundle.details import AotiDetails
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Call, Input, Program, TensorSpec
from wanexport.runtime.wan_config import WanConfig

FULL, SMALL = Geometry(256, 256, 17), Geometry(128, 256, 17)  # grids (5, 16, 16) and (5, 8, 16)
CONFIG = small_config("t2v-1.3b")
WIDTH = 4
Plant = Callable[["Toy", Tensor], Tensor]  # the rest of the toy's one call


class Toy(Graph):
    """One call that is nearly the same at every size; a test plants what it does last."""

    table: Tensor

    @staticmethod
    def describe(config: WanConfig, geometry: Geometry) -> Program:
        shape = (geometry.num_tokens, WIDTH)
        call = Call("block", ("x",), ("velocity",))
        return Program({"x": Input(shape)}, {"velocity": TensorSpec(shape)}, (call,))

    def __init__(
        self, config: WanConfig, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__(config, geometry, dtype)
        self.register_buffer("table", self.rows(), persistent=False)

    @property
    def is_large(self) -> bool:
        return self.geometry.num_tokens > 1000

    def rows(self) -> Tensor:
        """As many as the grid has, whatever the device is that modules are made on."""
        numbers = torch.arange(self.geometry.grid[1] * WIDTH, dtype=torch.float32, device="cpu")
        return numbers.reshape(-1, WIDTH)

    def block(self, x: Tensor) -> dict[str, Tensor]:
        y = x.reshape(self.geometry.grid[1], -1, WIDTH) * self.table[:, None]
        return {"velocity": self.last(y).reshape(x.shape)}

    def last(self, y: Tensor) -> Tensor:
        return y * 1.5


TOY = f"{__name__}:{Toy.__name__}"


def test_integers_of_the_grid_and_rows_of_tables_may_differ() -> None:
    differing = compare_programs(TOY, CONFIG, "fp32", FULL, SMALL)
    assert differing == {"block aten.reshape.default": 2}
    assert compare_programs(TOY, CONFIG, "fp32", FULL, FULL) == {}


PLANTED: dict[str, Plant] = {
    "operator": lambda toy, y: y.sin() if toy.is_large else y.cos(),
    "another node": lambda toy, y: y.sin().cos() if toy.is_large else y.sin(),
    "order": lambda toy, y: y.sin().cos() if toy.is_large else y.cos().sin(),
    "connection": lambda toy, y: y - y.sin() if toy.is_large else y.sin() - y,
    "floating-point number": lambda toy, y: y * (1.5 if toy.is_large else 1.25),
    "a float for an integer": lambda toy, y: y * (2.0 if toy.is_large else 2),
    "a truth for an integer": lambda toy, y: y.softmax(-1) * (True if toy.is_large else 1),
    "a number for a value": lambda toy, y: y * 3 if toy.is_large else y * y,
    "integer of no grid": lambda toy, y: y.roll(3 if toy.is_large else 1, -1),
    "integer of the ratio alone": lambda toy, y: y.roll(2 if toy.is_large else 1, -1),
    "where numbers stand": lambda toy, y: (
        y.clamp(min=-1, max=1.0) if toy.is_large else y.clamp(min=-1.0, max=1)
    ),
    "dtype": lambda toy, y: y.to(torch.bfloat16 if toy.is_large else torch.float16).float(),
    "rank": lambda toy, y: (y[None] if toy.is_large else y) * 2,
    "named argument": lambda toy, y: torch.nn.functional.gelu(
        y, approximate="tanh" if toy.is_large else "none"
    ),
}


@pytest.mark.parametrize("difference", PLANTED)
def test_each_other_difference_is_refused(difference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "last", PLANTED[difference])
    with pytest.raises(WanExportError, match=r"^block has .* is not this engine") as caught:
        compare_programs(TOY, CONFIG, "fp32", FULL, SMALL)
    assert "\n" not in str(caught.value)


TABLES: dict[str, Callable[[Toy, Tensor], Tensor]] = {
    "numbers": lambda toy, rows: rows * 2 if toy.is_large else rows,
    "a number by one bit": lambda toy, rows: rows * (1 + 2**-23) if toy.is_large else rows,
    "dtype": lambda toy, rows: rows.double() if toy.is_large else rows,
}


@pytest.mark.parametrize("difference", TABLES)
def test_another_table_is_refused(difference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Toy.rows
    monkeypatch.setattr(Toy, "rows", lambda toy: TABLES[difference](toy, rows(toy)))
    with pytest.raises(WanExportError, match=r"^block has "):
        compare_programs(TOY, CONFIG, "fp32", FULL, SMALL)


def test_a_table_in_bf16_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Toy.rows
    monkeypatch.setattr(Toy, "rows", lambda toy: rows(toy).bfloat16())
    assert compare_programs(TOY, CONFIG, "fp32", FULL, SMALL)
    monkeypatch.setattr(Toy, "rows", lambda toy: rows(toy).bfloat16() + toy.is_large)
    with pytest.raises(WanExportError, match=r"block has a constant of 1\.0 "):
        compare_programs(TOY, CONFIG, "fp32", FULL, SMALL)


def test_a_difference_in_a_branch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def branch(toy: Toy, y: Tensor) -> Tensor:
        factor = 3.0 if toy.is_large else 2.0
        return torch.cond(y.sum() > 0, lambda y: y * factor, lambda y: y.sin(), (y,))

    monkeypatch.setattr(Toy, "last", branch)
    with pytest.raises(WanExportError, match="block has "):
        compare_programs(TOY, CONFIG, "fp32", FULL, SMALL)


@pytest.mark.parametrize("preset", slow_but(VARIANTS, *QUICK_PRESETS))
def test_what_every_variant_is_traced_to_differs_by_the_grid_alone(preset: str) -> None:
    config = small_config(preset)
    stride = family_of(config).vae.spatial_stride
    full = Geometry(32 * stride, 48 * stride, 17, stride)
    small = full.reduced(1000)
    assert full.num_tokens > 1000 >= small.num_tokens
    differing = compare_programs(family_of(config).graph, config, "bf16", full, small)
    assert {name.partition(" ")[0] for name in differing} <= {"embed", "block", "head"}
    assert "block aten.reshape.default" in differing


def test_a_cpus_proof_refuses_a_fault_of_large_videos_before_it_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = WanModel.block

    def wrong(model: WanModel, index: int, x: Tensor, **conditioning: Tensor) -> dict[str, Tensor]:
        scaled = x * (1.001 if model.geometry.num_tokens > 1000 else 1.0)
        return right(model, index, scaled, **conditioning)

    compiled: list[Any] = []

    def compile_regions(*arguments: Any) -> Any:
        compiled.append(arguments)
        raise RuntimeError("nothing is compiled here")

    monkeypatch.setattr(prove, "compile_regions", compile_regions)
    request = Request(
        CONFIG, FULL, family_of(CONFIG).sampling, "aoti", "fp32", "cpu", {"device": "cpu"}
    )
    engine: Any = type("Engine", (), {"files": {}, "details": AotiDetails(attention={})})
    with pytest.raises(RuntimeError, match="nothing is compiled here"):
        prove.prove_regions(request, engine, tmp_path, [], "ends")
    (asked,) = compiled
    assert asked[2].num_tokens <= 1000 < FULL.num_tokens
    monkeypatch.setattr(WanModel, "block", wrong)
    with pytest.raises(WanExportError, match="what the proof runs is not this engine"):
        prove.prove_regions(request, engine, tmp_path, [], "ends")
    assert compiled == [asked]
