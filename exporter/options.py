"""Options that commands share, and the parsing of what click has no type for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.load import BACKENDS, DEVICES, KERNELS

DTYPES = ("fp32", "bf16", "fp16")
SEED, COUNT = click.IntRange(min=0), click.IntRange(min=1)
_Command = TypeVar("_Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def engine_options(command: _Command) -> _Command:
    """The options that choose one engine of a bundle."""
    for option in (
        click.option("--device", type=click.Choice(DEVICES), help="That runs the engine."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Engine precision."),
        click.option("--frames", type=int, help="Pixel frames of the engine."),
        click.option("--resolution", help="Height x width of the engine, as 480x832."),
        click.option("--backend", type=click.Choice(BACKENDS), help="Engine backend."),
    ):
        command = option(command)
    return command


def aoti_options(command: _Command) -> _Command:
    """The options of AOTInductor engines, as `load` takes them."""
    for option in (
        click.option(
            "--cuda-graph/--no-cuda-graph", default=None,
            help="Replay a captured graph. Default: where launching takes as long as running.",
        ),
        click.option(
            "--offload", is_flag=True, help="Keep one of two experts on the GPU, swap them."
        ),
        click.option(
            "--attention", type=click.Choice(KERNELS), help="Self-attention in an aoti engine."
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def parse_guidance(text: str | None) -> float | tuple[float, float] | None:
    """A number, or LOW,HIGH as a pair. Raises WanExportError for anything else."""
    numbers = parse_numbers("--guidance", text)
    if numbers is None:
        return None
    if len(numbers) > 2:
        raise WanExportError(f"--guidance {text} has {len(numbers)} numbers: give one, or LOW,HIGH")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers with commas between. Raises WanExportError for anything else."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise WanExportError(f"{option} {text!r}: expected numbers, with commas between") from error


def check_output(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if output.suffix != ".safetensors" or output.is_dir():
        raise WanExportError(f"{output}: latents go to a .safetensors file, name one with -o")
    if not os.access(output.parent, os.W_OK):
        raise WanExportError(f"cannot write in {output.parent}: name an existing folder with -o")
