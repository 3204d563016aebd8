"""Options that commands share, and the parsing of what click has no type for."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from wanexport.exporter.cli.streams import minding_the_reader, printing
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.engines.device_name import check_device
from wanexport.runtime.engines.kernels import KERNELS
from wanexport.runtime.engines.onnx_providers import PROVIDERS
from wanexport.runtime.engines.table import BACKENDS
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.solvers import SOLVERS

DTYPES = PRECISIONS
SEED, COUNT = click.IntRange(min=0), click.IntRange(min=1)
_SIZES = (2**20, 2**50)  # of a --workspace: a plain 8 is not meant, nor is a petabyte
_MAY_BE_EMPTY = ("negative",)  # an empty prompt is one
_FILE = click.Path(path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])
_Added = Callable[[_Command], _Command]


class Device(click.ParamType[str]):
    """A device by PyTorch's name."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is. Raises BadParameter for what names no device."""
        try:
            return check_device(str(value))
        except BadRequest as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """How the help shows it."""
        return "[cpu|cuda|cuda:N]"


DEVICE = Device()


class CheckedCommand(click.Command):
    """A command that refuses, by the option's name, what nobody means: nothing, NaN and infinity.

    An empty value is what a script's variable has that was never set; as a path it would name the
    folder that the script runs in.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises BadParameter for an empty text, or a number that is none."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.get_params(ctx):
            if parameter.name not in _MAY_BE_EMPTY and _has_blank(given.get(parameter.name or "")):
                leave = "" if parameter.required else ", or leave it out"
                reason = f"it is empty, as a variable that was never set: give a value{leave}"
                raise click.BadParameter(reason, ctx, parameter)
        with printing():  # the help, where that is asked for
            rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name or "")
            if isinstance(value, float) and not math.isfinite(value):
                raise click.BadParameter(f"{value} is no finite number", ctx, parameter)
        return rest


def _has_blank(given: Any) -> bool:
    values = given if isinstance(given, list | tuple) else [given]
    return any(isinstance(value, str) and not value.strip() for value in values)


class CheckedGroup(click.Group):
    """Makes every command of it a CheckedCommand."""

    command_class = CheckedCommand

    # Inside click, which gives a pipe that broke the exit code of a failed check.
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and print the help where that is asked for."""
        with minding_the_reader(), printing():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with minding_the_reader():
            return super().invoke(ctx)


def parse_pairs(option: str, texts: Iterable[str]) -> dict[str, str] | None:
    """KEY=VALUE, several times; None of none.

    Raises BadRequest for anything else, and for a key twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, _, value = (part.strip() for part in text.partition("="))
        if not key or not value:
            raise BadRequest(f"{option} {text!r}: expected KEY=VALUE")
        if pairs.setdefault(key, value) != value:
            raise BadRequest(f"{option} names {key} twice: {pairs[key]} and {value}")
    return pairs or None


def parse_names(option: str, text: str | None) -> list[str] | None:
    """Names with commas between. Raises BadRequest when one of them is empty."""
    names = None if text is None else [name.strip() for name in text.split(",")]
    if names is not None and not all(names):
        raise BadRequest(f"{option} {text!r} has an empty name: expected names, commas between")
    return names


def parse_size(option: str, text: str | None) -> int | None:
    """Bytes of `8GiB`, `500MB` or a plain number. Raises BadRequest for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) *([kmgt]?)(i?)b?", text.strip(), re.IGNORECASE)
    size = 0.0
    if match is not None:
        base = 1024 if match[3] else 1000
        size = float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")
    if not _SIZES[0] <= size <= _SIZES[1]:
        raise BadRequest(f"{option} {text!r}: expected a size from 1MiB, as 8GiB or 500MB")
    return int(size)


def parse_guidance(option: str, text: str | None) -> float | tuple[float, float] | None:
    """A number, or LOW,HIGH as a pair. Raises BadRequest for anything else."""
    numbers = parse_numbers(option, text)
    if numbers is None:
        return None
    if len(numbers) > 2:
        raise BadRequest(f"{option} {text} has {len(numbers)} numbers: give one, or LOW,HIGH")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_numbers(option: str, text: str | None) -> list[float] | None:
    """Finite numbers with commas between. Raises BadRequest for anything else."""
    try:
        numbers = None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if numbers is not None and not all(map(math.isfinite, numbers)):
        raise BadRequest(f"{option} {text!r:.80}: expected numbers, with commas between")
    return numbers


def parsed(parse: Callable[[str, Any], Any]) -> Callable[..., Any]:
    """The callback of an option whose value is parsed, and refused by the option's name."""
    return lambda context, parameter, value: parse(parameter.opts[-1], value)


def take(options: dict[str, Any], record: type) -> dict[str, Any]:
    """Those of the options that are fields of a record; they are not left in options."""
    return {f.name: options.pop(f.name) for f in fields(record) if f.name in options}


def _adding(*options: Callable[[_Command], _Command]) -> _Added[_Command]:
    """A decorator that adds options to a command, in the order of its help."""

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
prompt_options = _adding(
    click.option("--prompt", help="What the video shows."),
    click.option(
        "--text", "text_file", type=_FILE,
        help="In place of --prompt: a safetensors file with text [n, 4096], and where they apply "
        "negative, noise, first_frame and the engine's other inputs, as `inspect` names them.",
    ),
    click.option("--negative", help="What to keep away from. Default: the model's own text."),
    click.option("--image", type=_FILE, help="First frame, for image-to-video and TI2V."),
    click.option("--last-image", type=_FILE, help="Last frame, for first-last-frame models."),
    click.option(
        "-m", "--model",
        help="Checkpoint (folder or hub id) with the text encoder and the VAE. Default: the one "
        "the bundle came from.",
    ),
    click.option(
        "-o", "--output", required=True, type=_FILE, help="X.mp4, or X.safetensors: the latent."
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUTPUT and its record."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise."),
)  # fmt: skip
sampling_options = _adding(
    click.option("--steps", type=COUNT, help="Default: the model's own."),
    click.option("--shift", type=float, help="Default: the model's own."),
    click.option(
        "--guidance", callback=parsed(parse_guidance),
        help="A number, or LOW,HIGH noise; 1 is none. Default: the model's.",
    ),
    click.option("--solver", type=click.Choice(list(SOLVERS)), help="Default: unipc."),
    click.option(
        "--timesteps", callback=parsed(parse_numbers),
        help="A distilled model's timesteps, as 1000,750,500,250.",
    ),
)  # fmt: skip
_MEASURED = (  # the fields of EngineOptions that say something of one expert of any backend
    click.option("--resolution", help="Height x width of the engine, as 480x832."),
    click.option("--frames", type=int, help="Pixel frames of the engine."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Engine precision."),
    click.option("--device", type=DEVICE, help="That runs the engine."),
    click.option(
        "--weights", metavar="NAME|FOLDER|FILE",
        help="A weights set of the bundle, or other weights of the same layout. Default: base.",
    ),
    click.option(
        "--attention", type=click.Choice(KERNELS), help="Self-attention in an aoti engine."
    ),
    click.option(
        "--cuda-graph/--no-cuda-graph", default=None,
        help="Replay a captured graph. Default: where launching takes as long as running.",
    ),
    click.option(
        "--provider", type=click.Choice(list(PROVIDERS)),
        help="Of ONNX Runtime, for an ONNX engine. Default: cuda on a GPU, else cpu.",
    ),
    click.option(
        "--provider-option", "provider_options", multiple=True, metavar="KEY=VALUE",
        callback=parsed(parse_pairs), help="An option of that provider; may be repeated.",
    ),
)  # fmt: skip
bench_options = _adding(*_MEASURED)
engine_options = _adding(  # the fields of EngineOptions
    click.option("--backend", type=click.Choice(BACKENDS), help="Engine backend."),
    *_MEASURED,
    click.option("--offload", is_flag=True, help="Keep one of two experts on the GPU, swap them."),
)
tensorrt_options = _adding(  # the fields of TensorRtOptions
    click.option(
        "--target", "targets", metavar="SM,...", callback=parsed(parse_names),
        help="Architectures for tensorrt-rtx, as sm89,sm120.",
    ),
    click.option(
        "--optimization-level", type=click.IntRange(0, 5), help="TensorRT's effort. Default: 3."
    ),
    click.option(
        "--workspace", metavar="SIZE", callback=parsed(parse_size),
        help="Limit of TensorRT's memory, as 8GiB.",
    ),
    click.option("--hardware-compatible", is_flag=True, help="Plan for Ampere and newer, slower."),
    click.option(
        "--version-compatible", is_flag=True, help="Plan for later TensorRT versions too."
    ),
    click.option("--bake-weights", is_flag=True, help="Weights inside a TensorRT engine."),
    click.option(
        "--allow-unfused", is_flag=True, help="Keep a TensorRT engine without fused attention."
    ),
)  # fmt: skip
