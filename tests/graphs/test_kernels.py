"""The Triton kernels of CUDA engines, run by Triton's interpreter on a CPU, against PyTorch."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.quick import slow_but

pytest.importorskip("triton", reason="needs Triton")

# Triton decides at import whether it interprets, and torch.library knows only compiled kernels. In
# fp16, as the interpreter cuts where it should round to bf16.
CHILD = """
import json, sys
from dataclasses import replace
import torch
torch.library.wrap_triton = lambda kernel: kernel
from wanexport.graphs.causal import CausalBlock, Chunk
from wanexport.graphs.causal_fused import FusedCausalBlock
from wanexport.graphs.config import PRESETS
from wanexport.graphs.fused_block import FusedBlock
from wanexport.graphs.graph import parameter_dtype
from wanexport.graphs.wan import Block, Conditioning

config = replace(PRESETS["i2v-14b"].config, dim=384, ffn_dim=512, num_heads=3)  # no power of two

def of_same_weights(kind, fused_kind, config, dtype):
    plain, fused, exact = kind(config), fused_kind(config), kind(config)
    for name, p in plain.named_parameters():
        value = torch.randn_like(p) / p.shape[-1] ** 0.5
        p.data = value.to(parameter_dtype(f"blocks.0.{name}", dtype))
    fused.load_state_dict(plain.state_dict(), assign=True)
    exact.load_state_dict({k: v.float() for k, v in plain.state_dict().items()}, assign=True)
    return plain, fused, exact

def errors(dtype, rows):
    torch.manual_seed(0)
    plain, fused, exact = of_same_weights(Block, FusedBlock, config, dtype)
    angles = torch.randn(1, rows * 5, 1, 64)
    given = {"modulation": torch.randn(rows, 6, 384), "cos": angles.cos(), "sin": angles.sin()}
    low = {"context": torch.randn(1, 512, 384), "image_context": torch.randn(1, 257, 384)}
    cond = Conditioning(**given, **{k: v.to(dtype) for k, v in low.items()})
    wide = Conditioning(**{k: v.float() for k, v in cond._asdict().items()})
    x = torch.randn(rows, 5, 384)
    with torch.no_grad():
        right = exact(x, wide)
        return [((b(x, cond) - right).norm() / right.norm()).item() for b in (fused, plain)]

def causal_errors(dtype):
    # Of the stream, and of the keys and values that two frames leave in slots 3 and 1.
    torch.manual_seed(0)
    config = replace(PRESETS["causal-tiny"].config, dim=384, ffn_dim=512, num_heads=3)
    plain, fused, exact = of_same_weights(CausalBlock, FusedCausalBlock, config, dtype)
    angles = torch.randn(1, 10, 1, 64)
    slots, keys = torch.tensor([3, 1]), torch.tensor([20])
    chunk = Chunk(torch.randn(2, 6, 384), angles.cos(), angles.sin(), slots, keys)
    state = [torch.randn(1, n, 3, 128).to(dtype) for n in (25, 25, 512, 512)]
    x = torch.randn(2, 5, 384)
    found = {}
    with torch.no_grad():
        for name, block in (("exact", exact), ("fused", fused), ("plain", plain)):
            wide = [(s.float() if name == "exact" else s).clone() for s in state]
            only = [s.clone() for s in wide[:2]]
            block(x, chunk._replace(keys=None), *only)
            found[name] = [block(x, chunk, *wide), *wide[:2], *only]
    return {
        name: [((a.float() - b).norm() / b.norm()).item() for a, b in zip(own, found["exact"])]
        for name, own in found.items()
    }

dtype = getattr(torch, sys.argv[1])
print(json.dumps([[errors(dtype, rows) for rows in (1, 3)], causal_errors(dtype)]))
"""


class Found(NamedTuple):
    """What the child tells: pairs of errors, and those of the causal block, within a gate."""

    block: list[tuple[float, float]]
    causal: dict[str, list[float]]
    dtype: str

    def is_within(self, fused: float, plain: float) -> bool:
        """In fp32 exact, and below it no farther off than the plain block."""
        return fused <= (1e-6 if self.dtype == "float32" else 1.25 * plain)


@pytest.fixture(scope="module", params=slow_but(["float32", "float16"], "float16"))
def found(request: pytest.FixtureRequest) -> Found:
    """The errors of the blocks."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, request.param],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    block, causal = json.loads(child.stdout)
    return Found(block, causal, request.param)


def test_the_fused_block_is_as_exact_as_the_block(found: Found) -> None:
    assert len(found.block) == 2
    for fused, plain in found.block:
        assert found.is_within(fused, plain), found


def test_the_fused_causal_block_keeps_and_gives_what_the_block_does(found: Found) -> None:
    """The stream and the cache of a step, and the cache of a commit's last layer."""
    fused, plain = found.causal["fused"], found.causal["plain"]
    assert len(fused) == 5
    for own, floor in zip(fused, plain):
        assert found.is_within(own, floor), found
