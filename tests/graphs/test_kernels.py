"""The Triton kernels of CUDA engines, run by Triton's interpreter on a CPU, against PyTorch."""

import json
import os
import subprocess
import sys

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
from wanexport.graphs.config import PRESETS
from wanexport.graphs.fused_block import FusedBlock
from wanexport.graphs.graph import parameter_dtype
from wanexport.graphs.wan import Block, Conditioning

config = replace(PRESETS["i2v-14b"].config, dim=384, ffn_dim=512, num_heads=3)  # no power of two

def errors(dtype, rows):
    torch.manual_seed(0)
    plain, fused = Block(config), FusedBlock(config)
    for name, p in plain.named_parameters():
        value = torch.randn_like(p) / p.shape[-1] ** 0.5
        p.data = value.to(parameter_dtype(f"blocks.0.{name}", dtype))
    fused.load_state_dict(plain.state_dict(), assign=True)
    exact = Block(config)
    exact.load_state_dict({k: v.float() for k, v in plain.state_dict().items()}, assign=True)
    angles = torch.randn(1, rows * 5, 1, 64)
    given = {"modulation": torch.randn(rows, 6, 384), "cos": angles.cos(), "sin": angles.sin()}
    low = {"context": torch.randn(1, 512, 384), "image_context": torch.randn(1, 257, 384)}
    cond = Conditioning(**given, **{k: v.to(dtype) for k, v in low.items()})
    wide = Conditioning(**{k: v.float() for k, v in cond._asdict().items()})
    x = torch.randn(rows, 5, 384)
    with torch.no_grad():
        right = exact(x, wide)
        return [((b(x, cond) - right).norm() / right.norm()).item() for b in (fused, plain)]

dtype, rows = sys.argv[1:]
print(json.dumps(errors(getattr(torch, dtype), int(rows))))
"""


@pytest.mark.parametrize("dtype", slow_but(["float32", "float16"], "float16"))
@pytest.mark.parametrize("rows", slow_but([1, 3], 3))
def test_the_fused_block_is_as_exact_as_the_block(dtype: str, rows: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, dtype, str(rows)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    fused, plain = json.loads(child.stdout)
    assert fused <= (1e-6 if dtype == "float32" else 1.25 * plain), (fused, plain)
