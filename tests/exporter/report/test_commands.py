"""The command below each part of a page asks for what was done."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from wanexport.exporter.cli.main import cli
from wanexport.exporter.report.commands import compare_command
from wanexport.runtime.bundle.manifest import read_manifest

ROW = {"step": 0, "drift": 1e-6}
RESULT: dict[str, Any] = {
    "reference": "graph", "model": None, "weights": None, "inputs": "seed 7", "outputs": None,
    "bisect": None, "steps": [ROW, ROW],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, {"reference": "graph", "seed": 7, "steps": 2, "bisect": False}),
        ({"bisect": {"calls": []}}, {"bisect": True}),
        ({"reference": "64x96x9/aoti-bf16-sm90"}, {"against": "aoti"}),
        ({"reference": "64x96x9/tensorrt-rtx-bf16-sm89"}, {"against": "tensorrt-rtx"}),
        ({"inputs": "my text.safetensors"}, {"inputs": Path("my text.safetensors"), "steps": 2}),
        (
            {"inputs": "c.safetensors", "steps": [{"step": 0, "drift": None}]},
            {"calls": Path("c.safetensors"), "inputs": None},
        ),
        (
            {
                "reference": "recorded (diffusers, bf16)", "outputs": "o.safetensors",
                "inputs": "c.safetensors", "steps": [{"step": 0, "drift": None}],
            },
            {"reference": "diffusers", "outputs": Path("o.safetensors"), "outputs_dtype": "bf16"},
        ),
        ({"model": "a/b", "weights": "style"}, {"model": "a/b", "weights": "style"}),
    ],
)  # fmt: skip
def test_it_has_what_was_compared(
    changes: dict[str, Any], asked: dict[str, Any], tiny_bundle: Path
) -> None:
    engine = read_manifest(tiny_bundle).engines[0]
    command = compare_command("a folder", engine, {**RESULT, **changes})
    _, name, *words = shlex.split(command)
    given = cli.commands[name].make_context(name, words).params
    chosen = {"bundle": Path("a folder"), "backend": "onnx", "frames": 9, "dtype": engine.dtype}
    for option, value in {**chosen, **asked}.items():
        assert given[option] == value, option
