"""The command line: each command calls one function with its options and prints what it returns.

What needs PyTorch is imported inside the command that needs it: `wanexport run` works without.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

from wanexport.exporter.bench.arms import ARMS, LEAST_ROUNDS
from wanexport.exporter.child.process import missing_name
from wanexport.exporter.cli.display import (
    show_bench,
    show_doctor,
    show_lint,
    show_run,
    show_stream,
)
from wanexport.exporter.cli.display_bundle import (
    show_add,
    show_build,
    show_inspect,
    show_ls,
    show_remove,
    show_report,
)
from wanexport.exporter.cli.display_compare import show_compare
from wanexport.exporter.cli.display_profile import show_profile
from wanexport.exporter.cli.options import (
    COUNT,
    DTYPES,
    SEED,
    CheckedGroup,
    as_json,
    attention_option,
    bench_options,
    chunk_options,
    device_option,
    dtype_option,
    ema_option,
    engine_options,
    frames_option,
    lora_options,
    low_noise_option,
    model_option,
    parse_names,
    parsed,
    profile_options,
    prompt_options,
    report_option,
    resolution_option,
    sampling_options,
    stream_options,
    take,
    tensorrt_options,
    vae_options,
    window_options,
)
from wanexport.exporter.cli.streams import minding_the_reader, prepare_streams, printing
from wanexport.exporter.cli.terminal import err, progress_display, write
from wanexport.exporter.run.request import RunRequest
from wanexport.exporter.run.run import run as run_request
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.table import BACKENDS
from wanexport.runtime.errors import WanExportError, WanExportWarning, explain, needing_extra
from wanexport.runtime.recipes import RECIPES
from wanexport.runtime.settings import Settings


@click.group(cls=CheckedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("wanexport"), prog_name="wanexport")
def cli() -> None:
    """Compile Wan video models ahead of time, and run them in the original sampling loop."""


@cli.command()
@model_option(
    "ID:FILE is one file of a hub repository. The bundle takes its weights. With --random-weights "
    "it is a preset. "
    "Default: Wan-AI/Wan2.1-T2V-1.3B."
)
@click.option(
    "--random-weights", type=SEED, metavar="SEED",
    help="The seed of random weights, for the preset that -m names.",
)  # fmt: skip
@low_noise_option
@ema_option
@click.option(
    "--expert-alone", is_flag=True, help="Build one expert of an A14B as a model by itself."
)
@lora_options
@resolution_option(required=True)
@frames_option(required=True)
@chunk_options
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(BACKENDS),
    help="The engine's backend. It may be repeated. Default: aoti on a GPU, onnx elsewhere.",
)  # fmt: skip
@dtype_option("bf16 on a GPU and for TensorRT, else fp32")
@device_option("a GPU if the backend can use one")
@attention_option("the fastest here")
@click.option(
    "--attention-operator", type=click.Choice(["native", "mha", "decomposed"]),
    help="How onnx and tensorrt graphs write attention: as ONNX's operator, as ONNX Runtime's own, "
    "or as products and a softmax. Default: mha for onnx on a GPU, else native.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER",
    help="The bundle's folder. Default: ./MODEL.",
)  # fmt: skip
@vae_options
@click.option(
    "--proof", type=click.Choice(["ends", "full"]), default="ends", show_default=True,
    help="The blocks that the proof runs: the first and the last, or all.",
)  # fmt: skip
@tensorrt_options
@as_json
def build(as_json: bool, **options: Any) -> None:
    """Compile a checkpoint for one resolution and frame count, into a new or an existing bundle.

    A proof ends it: a fresh process opens the engine and compares it with eager PyTorch.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.backends.backend import TensorRtOptions
        from wanexport.exporter.build import build as run_build

    options["targets"] = tuple(options["targets"] or ())
    options["tensorrt"] = TensorRtOptions(**take(options, TensorRtOptions))
    options["backends"] = options["backends"] or None
    with progress_display() as show:
        record = run_build(progress=show, **options)
    _report(record, as_json, show_build)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name")
@model_option("The set takes its weights. Default: the bundle's base set, for the LoRAs.")
@low_noise_option
@ema_option
@lora_options
@click.option(
    "--recipe", type=click.Choice(list(RECIPES)),
    help="How a run with the set samples, by the name of a distilled model. Default: as the "
    "model does.",
)  # fmt: skip
@as_json
def add(bundle: Path, name: str, as_json: bool, **options: Any) -> None:
    """Add a weights set for the engines that a bundle has. Nothing is compiled.

    NAME is what `run --weights NAME` calls it.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.sets.add import add as run_add

    with progress_display() as show:
        record = run_add(bundle, name, progress=show, **options)
    _report(record, as_json, show_add)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@as_json
def ls(bundle: Path, as_json: bool) -> None:
    """List the weights sets and engines of a bundle, and where the sets come from."""
    from wanexport.exporter.inspection import list_bundle

    _report(list_bundle(bundle), as_json, show_ls)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name")
@as_json
def remove(bundle: Path, name: str, as_json: bool) -> None:
    """Take a weights set or an engine out of a bundle, and delete its files.

    NAME is as `ls` shows it.
    """
    from wanexport.exporter.sets.remove import remove as run_remove

    _report(run_remove(bundle, name), as_json, show_remove)


def _report(record: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    with printing():
        if as_json:
            click.echo(json.dumps(record))
        else:
            show(record)


def _warn(warning: str | None) -> None:
    """Show what became of a result's files, where they were not saved."""
    if warning:
        write(err, ("warning: ", "yellow"), warning)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@prompt_options
@sampling_options
@engine_options
@as_json
def run(bundle: Path, as_json: bool, **options: Any) -> None:
    """Make a video or a latent, from a prompt or from text embeddings.

    A record beside the output, X.json or X.safetensors.json, holds what repeats the run.
    """
    engine = EngineOptions(**take(options, EngineOptions))
    settings = Settings(**take(options, Settings))
    request = RunRequest(bundle, **options, settings=settings, engine=engine)
    with progress_display() as show:
        record = run_request(request, show=show, tell=_tell)
    _report(record, as_json, show_run)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@stream_options
@engine_options
@as_json
def stream(bundle: Path, as_json: bool, **options: Any) -> None:
    """Make the video of a causal model chunk by chunk, and write frames as they come.

    A record beside the output, X.json or X.safetensors.json, holds what repeats the stream.
    """
    from wanexport.exporter.run.stream import StreamRequest
    from wanexport.exporter.run.stream import stream as stream_request
    from wanexport.runtime.serving.streaming import VideoOptions

    engine = EngineOptions(**take(options, EngineOptions))
    video = VideoOptions(**take(options, VideoOptions))
    request = StreamRequest(bundle, **options, video=video, engine=engine)
    with progress_display() as show:
        record = stream_request(request, show=show, tell=_tell)
    _report(record, as_json, show_stream)


def _tell(note: str) -> None:
    write(err, ("note: ", "yellow"), note)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@model_option("The reference takes its tensors. Default: the bundle's weights.")
@low_noise_option
@ema_option
@click.option(
    "--reference", type=click.Choice(["graph", "diffusers"]), default="graph", show_default=True,
    help="The model whose eager fp32 forward is right: our graph, or diffusers' own. With "
    "--outputs, it has the precision policy that these were computed with.",
)  # fmt: skip
@click.option(
    "--inputs", type=click.Path(path_type=Path), metavar="FILE",
    help="The inputs of the loop: a safetensors file as --text of run takes it.",
)  # fmt: skip
@click.option(
    "--calls", type=click.Path(path_type=Path), metavar="FILE",
    help="The stacked inputs of recorded calls, a safetensors file, in place of a loop.",
)  # fmt: skip
@click.option(
    "--outputs", type=click.Path(path_type=Path), metavar="FILE",
    help="The recorded velocity of each of the calls, a safetensors file: the reference.",
)  # fmt: skip
@click.option(
    "--outputs-dtype", type=click.Choice(DTYPES), default="fp32",
    show_default=True, help="The precision in which the outputs were computed.",
)  # fmt: skip
@click.option(
    "--steps", type=COUNT, default=4, show_default=True, metavar="NUMBER",
    help="How many steps the loop has.",
)  # fmt: skip
@click.option(
    "--seed", type=SEED, default=0, show_default=True, metavar="NUMBER",
    help="The seed of all inputs that no file gives.",
)  # fmt: skip
@click.option(
    "--against", type=click.Choice(BACKENDS),
    help="The backend of another engine of the bundle and size, which is the reference in place of "
    "a model.",
)  # fmt: skip
@click.option(
    "--bisect", is_flag=True,
    help="Name the first call, a block say, whose error exceeds its floor, and for onnx the first "
    "node in it.",
)  # fmt: skip
@window_options
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE",
    help="Save the curves of error, floor, gate and drift: an .svg file.",
)  # fmt: skip
@report_option()
@click.option(
    "--save-inputs", type=click.Path(path_type=Path), metavar="FILE",
    help="Save what engine and reference are given, as polygraphy's JSON.",
)  # fmt: skip
@click.option(
    "--save-outputs", type=click.Path(path_type=Path), metavar="FILE",
    help="Save the velocities of both, as polygraphy's JSON.",
)  # fmt: skip
@click.option(
    "--overwrite", is_flag=True,
    help="Replace the files of --plot, --save-inputs and --save-outputs if they are there.",
)  # fmt: skip
@engine_options
@as_json
def compare(bundle: Path, as_json: bool, **options: Any) -> None:
    """Compare an engine with a reference, step by step. The exit code is 1 when a step fails.

    An error is relative L2. The floor is the error of eager PyTorch in the engine's precision. The
    drift is the error of the latent in a loop of the engine's own.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.compare.compare import compare as run_compare

    with progress_display() as show:
        result = run_compare(bundle, progress=show, **options)
    _report(result, as_json, show_compare)
    _warn(result["warning"])
    if not result["passed"]:
        sys.exit(1)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--arms", metavar="NAME,...", callback=parsed(parse_names),
    help=f"The arms that are measured, of {', '.join(ARMS)}. Default: all that apply, on a CPU "
    "without compile.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(min=LEAST_ROUNDS), default=LEAST_ROUNDS, show_default=True,
    metavar="NUMBER", help="How many forwards of each arm are timed.",
)  # fmt: skip
@click.option(
    "--profile", is_flag=True, help="Count the host's waits, and measure how busy the GPU is."
)
@report_option()
@bench_options
@as_json
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure engines and PyTorch on the same inputs. The exit code is 1 when an arm fails.

    Each arm runs in a fresh process. The floor is the time that the forward's FLOPs take at the
    rate of this machine's best matrix product.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.bench.bench import bench as run_bench

    with progress_display() as show:
        result = run_bench(bundle, progress=show, **options)
    _report(result, as_json, show_bench)
    _warn(result["warning"])
    if result["failed"]:
        sys.exit(1)


@cli.command()
@click.argument("target")
@click.option(
    "--arm", type=click.Choice(list(ARMS)),
    help="What runs the model of a bundle. Default: the engine that runs best here.",
)  # fmt: skip
@click.option(
    "--steps", type=COUNT, metavar="NUMBER", help="How many steps are recorded. Default: 3."
)
@click.option(
    "--warmup", type=SEED, metavar="NUMBER", help="How many steps run before them. Default: 2."
)
@report_option("BUNDLE/reports, or the working directory")
@profile_options
@as_json
def profile(target: str, as_json: bool, **options: Any) -> None:
    """Say where the time of a step goes, and which lines of Python the host waits at.

    TARGET is a bundle, a MODULE:FUNCTION of the working directory that returns (model, args), or a
    Chrome trace of PyTorch's profiler. The trace is saved beside the digest.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.profile.profile import profile as run_profile

    with progress_display() as show:
        result = run_profile(target, progress=show, **options)
    _report(result, as_json, show_profile)
    _warn(result["warning"])


@cli.command()
@click.argument("target")
@click.option(
    "--parser", type=click.Choice(["tensorrt"]), help="A parser that must take the graph too."
)
@click.option(
    "--fix", is_flag=True,
    help="Rewrite the graph of an .onnx file or of MODULE:FUNCTION, and write it to -o.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="The file to write with --fix: X.onnx of an .onnx file, X.pt2 of MODULE:FUNCTION.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the output if it is there.")
@as_json
def lint(
    target: str,
    parser: str | None,
    fix: bool,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """List what a graph must not contain. The exit code is 1 when there is any.

    TARGET is a bundle, an .onnx file, a .pt2 of torch.export.save, or MODULE:FUNCTION. FUNCTION
    takes no arguments and returns (model, args) or (model, args, kwargs), model a torch.nn.Module;
    or returns a torch.export.ExportedProgram. Files are read, never run; MODULE is imported.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.rewrite.fix import lint_or_fix

    result = lint_or_fix(target, parser=parser, fix=fix, output=output, overwrite=overwrite)
    _report(result, as_json, show_lint)
    if not result["clean"]:
        sys.exit(1)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Hash every file, the weights too.")
@as_json
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Say what a bundle holds. The exit code is 1 when a file is missing or altered."""
    from wanexport.exporter.inspection import inspect as run_inspect

    record = run_inspect(bundle, verify=verify)
    _report(record, as_json, show_inspect)
    for problem in record["problems"]:
        _say_error(problem)
    if record["problems"]:
        sys.exit(1)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="The page. Default: BUNDLE/reports/report.html, which is replaced.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the output if it is there.")
@report_option()
@as_json
def report(bundle: Path, as_json: bool, **options: Any) -> None:
    """Show what is known of a bundle in one HTML file, which needs no network.

    It has what build, compare, bench and profile have found. Nothing is run.
    """
    with needing_extra("build,cpu", "this command"):
        from wanexport.exporter.report.report import report as write_report

    _report(write_report(bundle, **options), as_json, show_report)


@cli.command()
@click.option(
    "--gpu-memory", type=click.FloatRange(min=1), metavar="GIB",
    help="Say which published models fit on a GPU of so much memory. Default: the GPUs here.",
)  # fmt: skip
@as_json
def doctor(gpu_memory: float | None, as_json: bool) -> None:
    """Say what is installed and works here. The exit code is 1 when no bundle can run."""
    from wanexport.exporter.doctor import doctor as run_doctor

    record = run_doctor(gpu_memory=gpu_memory)
    _report(record, as_json, show_doctor)
    if not record["usable"]:
        sys.exit(1)


def main() -> None:
    """Entry point: what the user can put right is one line and exit code 2, the rest is traced."""
    with minding_the_reader():
        _run()


def _run() -> NoReturn:
    pressed = []

    def interrupt(number: int, _: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    os.environ.update(missing_name())
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        prepare_streams()
        sys.exit(cli(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (WanExportError, OSError) as error:
        _fail(explain(error))
    except BaseException:
        if not pressed:
            raise
        # Whatever became of the KeyboardInterrupt: torch raises errors of its own on the way out.
        resumes = sys.argv[1:2] in (["build"], ["add"])
        write(err, "interrupted" + (": run the same command again to go on" if resumes else ""))
        sys.exit(130)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Ours in one line; what libraries warn of is not the user's."""
    if issubclass(category, WanExportWarning):
        write(err, ("warning: ", "yellow"), str(message))


def _fail(message: str) -> NoReturn:
    _say_error(message)
    sys.exit(2)


def _say_error(message: str) -> None:
    write(err, ("error: ", "red"), " ".join(message.split()))


if __name__ == "__main__":
    main()
