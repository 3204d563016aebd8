"""Real models of others: diffusers' Wan and Helios, and Wan as the official code computes it."""

from collections import Counter
from itertools import product
from pathlib import Path

import onnx
import pytest
import torch

from tests.oracles.foreign_models import DTYPES, LAYERS, MODELS, official_wan
from tests.quick import slow_but
from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.program import count, lint_program
from wanexport.exporter.rewrite.fix_onnx import fix_onnx
from wanexport.exporter.rewrite.proof import Proof
from wanexport.exporter.rewrite.record import STRIDED_WRITES
from wanexport.exporter.rewrite.rewrite import rewrite

EXPECTED = {
    "diffusers Wan": Counter(strided_writes=2 * LAYERS),
    "diffusers Wan, a timestep for each token": Counter(strided_writes=2 * LAYERS),
    "diffusers Helios": Counter(strided_writes=2 * LAYERS),
    "official Wan": Counter(complex_products=2 * LAYERS, equal_rows=3),
}


def export(name: str, dtype: torch.dtype) -> torch.export.ExportedProgram:
    model, args, kwargs = MODELS[name](dtype)
    with torch.no_grad(), quiet("torch"):
        return torch.export.export(model, args, kwargs)


def scatters(path: Path) -> int:
    return sum(node.op_type == "ScatterND" for node in onnx.load(path).graph.node)


QUICK = (("diffusers Wan", torch.float32), ("official Wan", torch.bfloat16))


@pytest.mark.parametrize(("name", "dtype"), slow_but(product(MODELS, DTYPES), *QUICK))
def test_a_model_keeps_every_bit(name: str, dtype: torch.dtype) -> None:
    program = export(name, dtype)
    proof = Proof(program)
    found = rewrite(program)
    proof.check(program, "any")
    counts = count(lint_program(program))
    assert counts["strided_write"] == counts["complex"] == counts["host_sync"] == 0
    if name == "official Wan":  # which products are exact is the processor's
        assert sum(found.counts.values()) + len(found.left) == EXPECTED[name].total()
        assert found.counts["complex_products"] == 2 * LAYERS
    else:
        assert counts["fp64"] == 0  # so no rule is needed for such constants
        assert Counter(found.counts) == EXPECTED[name]
        assert not found.left


@pytest.mark.slow
def test_scatters_of_diffusers_wan_go_from_four_a_block_to_none(tmp_path: Path) -> None:
    paths = [tmp_path / "before.onnx", tmp_path / "after.onnx", tmp_path / "fixed.onnx"]
    program = export("diffusers Wan", torch.float32)
    for path in paths[:2]:
        with torch.no_grad(), quiet("torch"):
            made = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
        assert made is not None
        made.save(path)
        rewrite(program)
    found, uncompared = fix_onnx(paths[0], paths[2])
    assert found.counts[STRIDED_WRITES] == 2 * LAYERS
    assert uncompared is None
    assert [scatters(path) for path in paths] == [4 * LAYERS, 0, 0]


@pytest.mark.slow
def test_the_official_wan_is_exported_to_onnx_only_when_it_is_real(tmp_path: Path) -> None:
    model, args, _ = official_wan()
    with torch.no_grad(), quiet("torch"):
        program = torch.export.export(model, args)
        with pytest.raises(torch.onnx.OnnxExporterError):
            torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
        rewrite(program)
        made = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert made is not None
    made.save(tmp_path / "real.onnx")
    assert scatters(tmp_path / "real.onnx") == 0
