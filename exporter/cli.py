"""The command line: each command calls one function with its options and prints what it returns.

What needs PyTorch is imported inside the command that needs it: `wanexport run` works without.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.load import load
from wanexport.runtime.sample import make_plan, sample, seeded_noise
from wanexport.runtime.solvers import SOLVERS
from wanexport.runtime.tensorfile import load_arrays, save_arrays

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
_RUN_INPUTS = ("text", "negative", "condition", "image", "first_frame", "noise")
SEED, COUNT = click.IntRange(min=0), click.IntRange(min=1)
_Command = TypeVar("_Command", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def engine_options(command: _Command) -> _Command:
    """The options that choose one engine of a bundle."""
    for option in (
        click.option("--dtype", type=click.Choice(["fp32", "fp16"]), help="Engine precision."),
        click.option("--frames", type=int, help="Pixel frames of the engine."),
        click.option("--resolution", help="Height x width of the engine, as 480x832."),
        click.option("--backend", type=click.Choice(["onnx"]), help="Engine backend."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("wanexport"), prog_name="wanexport")
def cli() -> None:
    """Compile Wan video models ahead of time, and run them in the original sampling loop."""


@cli.command()
@click.option("-m", "--model", help="Checkpoint folder, hub id, or preset with --random-weights.")
@click.option("--resolution", required=True, help="Height x width as 480x832, or Wan's 832*480.")
@click.option("--frames", required=True, type=int, help="Pixel frames, 4k+1.")
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(["onnx"]), default=["onnx"],
    show_default=True, help="Engine backend; may be repeated.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
    help="Precision of matrix products and attention; bf16 does not run on a CPU.",
)  # fmt: skip
@click.option("--random-weights", type=SEED, metavar="SEED", help="Seeded weights of a preset.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle; default ./MODEL.")
@click.option(
    "--verify", type=click.Choice(["ends", "full"]), default="ends", show_default=True,
    help="Blocks that the proof runs: the first and last, or all.",
)  # fmt: skip
@as_json
def build(as_json: bool, **options: Any) -> None:
    """Compile a checkpoint for one resolution and frame count, into a new or an existing bundle.

    Ends with a proof: a fresh process opens the engine and compares it with eager PyTorch.
    """
    with _needing_the_build_extra():
        from wanexport.exporter.build import build as run_build

    with _progress() as show:
        record = run_build(progress=show, **options)
    if as_json:
        return click.echo(json.dumps(record))
    for engine in record["engines"]:
        _print_engine(record, engine)
    for name, file in record["weights"].items():
        out.print(f"  weights {name}: {_bytes(file['size'])}")
    if record["reused"]:
        out.print(f"  reused: {', '.join(record['reused'])}")
    out.print(f"  {record['seconds']} s, peak memory {_bytes(record['peak_rss_bytes'])}")


def _print_engine(record: dict[str, Any], engine: dict[str, Any]) -> None:
    geometry, proof = engine["geometry"], engine["proof"]
    size = sum(file["size"] for file in engine["files"].values())
    out.print(
        f"[bold]{escape(record['bundle'])}[/]: {record['model']}, height {geometry['height']}, "
        f"width {geometry['width']}, {geometry['frames']} frames, {record['tokens']} tokens"
    )
    out.print(f"  engine {engine['name']}: {_bytes(size)}")
    out.print(
        f"  proof: {proof['method']}, {proof['blocks']} blocks at {proof['tokens']} tokens; "
        f"relative L2 error {proof['error']:.1e}, gate {proof['gate']:.1e}"
    )


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--text", "text_file", required=True, type=click.Path(path_type=Path),
    help="Safetensors file with text [n, 4096], and where they apply negative, condition, image, "
    "first_frame and noise.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Latents.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option("--steps", type=COUNT, help="Default: the model's own.")
@click.option("--shift", type=float, help="Default: the model's own.")
@click.option("--guidance", help="A number, or LOW,HIGH noise; 1 is none. Default: the model's.")
@click.option("--solver", type=click.Choice(list(SOLVERS)), help="Default: unipc.")
@click.option("--timesteps", help="A distilled model's timesteps, as 1000,750,500,250.")
@engine_options
@as_json
def run(
    bundle: Path,
    text_file: Path,
    output: Path,
    seed: int,
    as_json: bool,
    backend: str | None,
    resolution: str | None,
    frames: int | None,
    dtype: str | None,
    guidance: str | None,
    timesteps: str | None,
    **settings: Any,
) -> None:
    """Sample a bundle from text embeddings and write the final latent as safetensors."""
    settings["guidance"] = _guidance(guidance)
    settings["timesteps"] = _numbers("--timesteps", timesteps)
    _check_output(output)
    started = time.monotonic()
    denoiser = load(bundle, backend=backend, resolution=resolution, frames=frames, dtype=dtype)
    inputs = _read_inputs(text_file)
    inputs.setdefault("noise", seeded_noise(denoiser.inputs["latent"].shape, seed))
    plan = make_plan(denoiser.sampling, **settings)
    loaded = time.monotonic()
    latent, pace = _sample_with_progress(denoiser, inputs, settings, len(plan))
    save_arrays(output, {"latent": latent})
    record = {
        "output": str(output),
        "engine": denoiser.record.name,
        "shape": latent.shape,
        "seed": seed,
        "solver": plan.solver,
        "timesteps": plan.schedule.timesteps,
        "guidance": plan.guidance,
        "load_seconds": round(loaded - started, 3),
        "seconds_per_step": round(pace, 3),
    }
    if as_json:
        return click.echo(json.dumps(record))
    out.print(
        f"[bold]{escape(str(output))}[/]: latent {list(latent.shape)}, seed {seed}, {plan.solver}, "
        f"{len(plan)} steps, {record['seconds_per_step']} s/step"
    )


def _sample_with_progress(
    denoiser: Denoiser, inputs: dict[str, Any], settings: dict[str, Any], steps: int
) -> tuple[Any, float]:
    """Return the final latent and the seconds per step."""
    started = time.monotonic()
    with _progress() as show:
        show("sampling", 0, steps)
        for step in sample(denoiser, **inputs, **settings):
            pace = (time.monotonic() - started) / (step.index + 1)
            show(f"sampling, {pace:.2f} s/step", step.index + 1, steps)
    return step.latent, pace


def _check_output(output: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if output.suffix != ".safetensors" or output.is_dir():
        raise WanExportError(f"{output}: latents go to a .safetensors file, name one with -o")
    if not os.access(output.parent, os.W_OK):
        raise WanExportError(f"cannot write in {output.parent}: name an existing folder with -o")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", type=COUNT, default=4, show_default=True, help="Length of the loop.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all inputs.")
@click.option("--report", type=click.Path(path_type=Path), help="Default: BUNDLE/reports.")
@engine_options
@as_json
def compare(bundle: Path, as_json: bool, **options: Any) -> None:
    """Compare an engine with eager PyTorch, step by step; exit code 1 when the gate fails."""
    with _needing_the_build_extra():
        from wanexport.exporter.compare import compare as run_compare

    with _progress() as show:
        result = run_compare(bundle, progress=show, **options)
    if as_json:
        click.echo(json.dumps(result))
    else:
        out.print(_compare_table(result))
        verdict = "[green]passed[/]" if result["passed"] else "[red]failed[/]"
        out.print(f"{result['engine']}: {verdict}")
    if result["warning"]:
        err.print("[yellow]warning:[/]", escape(result["warning"]))
    if not result["passed"]:
        sys.exit(1)


def _compare_table(result: dict[str, Any]) -> Table:
    table = Table(title="relative L2 error against the fp32 reference")
    for column in ("step", "engine", "floor", "gate", "passed", "drift of the latent"):
        table.add_column(column, justify="right")
    for row in result["steps"]:
        numbers = [_error(row[name]) for name in ("error", "floor", "gate")]
        mark = "yes" if row["passed"] else "no"
        table.add_row(str(row["step"]), *numbers, mark, _error(row["drift"]))
    return table


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _guidance(text: str | None) -> float | tuple[float, float] | None:
    numbers = _numbers("--guidance", text)
    if numbers is None:
        return None
    if len(numbers) > 2:
        raise WanExportError(f"--guidance {text} has {len(numbers)} numbers: give one, or LOW,HIGH")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise WanExportError(f"{option} {text!r}: expected numbers, with commas between") from error


def _read_inputs(path: Path) -> dict[str, Any]:
    arrays = load_arrays(path)
    unknown = [name for name in arrays if name not in _RUN_INPUTS]
    if unknown or "text" not in arrays:
        raise WanExportError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: expected text, and of "
            f"{', '.join(_RUN_INPUTS[1:])} what applies"
        )
    return arrays


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextmanager
def _needing_the_build_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise WanExportError(
            f"this command needs {error.name}: pip install 'wanexport[build,cpu]'"
        ) from error


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A live progress display on standard error: a line for each stage, silent when piped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)
        current = ""

        def show(stage: str, done: int, total: int) -> None:
            nonlocal current
            name = stage.partition(",")[0]  # what follows the comma changes within a stage
            if name != current:
                current = name
                bars.reset(task)  # restarts the clock
            bars.update(task, description=stage, completed=done, total=total or None)

        yield show


def main() -> None:
    """Entry point: what the user can put right is one line and exit code 2, the rest is traced."""
    try:
        cli()
    except (WanExportError, OSError) as error:
        err.print("[red]error:[/]", escape(str(error)))
        sys.exit(2)


if __name__ == "__main__":
    main()
