"""Options that commands share, and the parsing of what click has no type for."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from wanexport.exporter.cli.streams import minding_the_reader, printing
from wanexport.runtime.dtypes import PRECISIONS
from wanexport.runtime.engines.device_name import check_device
from wanexport.runtime.engines.engine import OFFLOADS
from wanexport.runtime.engines.kernels import KERNELS
from wanexport.runtime.engines.onnx_providers import PROVIDERS
from wanexport.runtime.engines.table import BACKENDS
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.recipes import RECIPES
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


def model_option(taken: str) -> Callable[[_Command], _Command]:
    """-m of a command: taken says what the command takes from the checkpoint, and the default."""
    return click.option(
        "-m", "--model", metavar="FOLDER|FILE|ID",
        help=f"The model's checkpoint: a folder, a file or a hub id. {taken}",
    )  # fmt: skip


low_noise_option = click.option(
    "--low-noise", metavar="FOLDER|FILE|ID",
    help="The low-noise expert of an A14B, where -m is the high-noise one alone.",
)  # fmt: skip
ema_option = click.option(
    "--ema/--no-ema", default=None,
    help="Which model of a training's file is read, as Self-Forcing's: generator_ema, or "
    "generator. Default: generator_ema, or the one that is there.",
)  # fmt: skip
lora_options = _adding(
    click.option(
        "--lora", multiple=True, metavar="FILE[:STRENGTH]",
        help="A LoRA to merge into the model, or into both experts. It may be repeated. "
        "Default strength: 1.",
    ),
    click.option(
        "--lora-high", multiple=True, metavar="FILE[:STRENGTH]",
        help="The same for the high-noise expert alone.",
    ),
    click.option(
        "--lora-low", multiple=True, metavar="FILE[:STRENGTH]",
        help="The same for the low-noise expert alone.",
    ),
    click.option(
        "--lora-partial", is_flag=True,
        help="Leave out what of a LoRA has no place in the model, with a warning that lists it.",
    ),
)  # fmt: skip
vae_options = _adding(
    click.option(
        "--parts", is_flag=True,
        help="Build an engine of the checkpoint's VAE too, and copy its text encoder, tokenizer "
        "and CLIP into the bundle, which then serves by itself.",
    ),
    click.option(
        "--vae", type=_FILE, metavar="FILE|FOLDER",
        help="The VAE of such an engine: the official file, or a folder of diffusers. Default: "
        "what the checkpoint has.",
    ),
    click.option(
        "--vae-dtype", type=click.Choice(["bf16", "fp32"]),
        help="The precision in which the VAE decodes. It encodes in fp32. Default: bf16 on a GPU, "
        "else fp32.",
    ),
    click.option(
        "--vae-chunk", type=COUNT, metavar="NUMBER",
        help="The latent frames that a call of the VAE takes, 1 to 5. Default: as memory allows.",
    ),
    click.option(
        "--vae-tf32", is_flag=True,
        help="Let the VAE's fp32 convolutions round their factors to TF32 on a GPU.",
    ),
)  # fmt: skip

resolution_option = partial(
    click.option, "--resolution", metavar="HEIGHTxWIDTH",
    help="The engine's height and width, as 480x832, or 832*480 as Wan writes it.",
)  # fmt: skip
frames_option = partial(
    click.option, "--frames", type=int, metavar="NUMBER",
    help="The engine's number of frames: 4k+1.",
)  # fmt: skip


def chunk_option(default: str = "") -> Callable[[_Command], _Command]:
    """--chunk, with what is its default in words, where it has one."""
    said = "How many latent frames a call of a causal model makes." + _default(default)
    return click.option("--chunk", type=COUNT, metavar="NUMBER", help=said)


def cache_option(default: str = "") -> Callable[[_Command], _Command]:
    """--cache, with what is its default in words, where it has one."""
    said = "How many latent frames a causal model can attend to, those of the call among them."
    return click.option("--cache", type=COUNT, metavar="NUMBER", help=said + _default(default))


def _default(words: str) -> str:
    return f" Default: {words}." if words else ""


chunk_options = _adding(
    click.option(
        "--family", metavar="NAME",
        help="The family of a checkpoint that does not say it: self-forcing for a causal Wan's. "
        "Default: what the checkpoint is.",
    ),
    chunk_option("3"),
    cache_option("those of the video"),
)  # fmt: skip


def dtype_option(default: str) -> Callable[[_Command], _Command]:
    """--dtype, with what is its default in words."""
    said = f"The precision of matrix products and attention. Default: {default}."
    return click.option("--dtype", type=click.Choice(DTYPES), help=said)


def device_option(default: str) -> Callable[[_Command], _Command]:
    """--device, with what is its default in words."""
    said = f"The device that runs the engine. Default: {default}."
    return click.option("--device", type=DEVICE, help=said)


def attention_option(default: str) -> Callable[[_Command], _Command]:
    """--attention, with what is its default in words."""
    said = f"The kernel of self-attention, for aoti engines. Default: {default}."
    return click.option("--attention", type=click.Choice(KERNELS), help=said)


def report_option(default: str = "BUNDLE/reports") -> Callable[[_Command], _Command]:
    """--report, with what is its default in words."""
    said = f"Where figures are saved. Default: {default}."
    return click.option("--report", type=_FILE, metavar="FOLDER", help=said)


tensorrt_options = _adding(  # the fields of TensorRtOptions
    click.option(
        "--target", "targets", metavar="SM,...", callback=parsed(parse_names),
        help="The GPU architectures that tensorrt-rtx builds plans for, as sm89,sm120. "
        "Default: that of the GPU here.",
    ),
    click.option(
        "--optimization-level", type=click.IntRange(0, 5), metavar="NUMBER",
        help="How long TensorRT searches for fast kernels. Default: 3.",
    ),
    click.option(
        "--workspace", metavar="SIZE", callback=parsed(parse_size),
        help="The limit of TensorRT's workspace, as 8GiB.",
    ),
    click.option(
        "--hardware-compatible", is_flag=True,
        help="Make a slower plan that runs on every GPU from Ampere on.",
    ),
    click.option(
        "--version-compatible", is_flag=True,
        help="Make a plan that later versions of TensorRT run too.",
    ),
    click.option("--bake-weights", is_flag=True, help="Put the weights into the plan."),
    click.option(
        "--allow-unfused", is_flag=True, help="Keep a plan whose attention is not fused."
    ),
)  # fmt: skip
_OUTPUT = (  # of what makes a video or its latent
    click.option(
        "-o", "--output", required=True, type=_FILE, metavar="FILE",
        help="The file to write: X.mp4 is the video, X.safetensors the latent.",
    ),
    click.option(
        "--overwrite", is_flag=True, help="Replace the output and its record if they are there."
    ),
    click.option(
        "--seed", type=SEED, default=0, show_default=True, metavar="NUMBER",
        help="The seed of the noise.",
    ),
)  # fmt: skip
prompt_options = _adding(
    click.option("--prompt", help="What the video shows."),
    click.option(
        "--text", "text_file", type=_FILE, metavar="FILE",
        help="Embeddings in place of --prompt: a safetensors file with text [n, 4096], and of "
        "negative, noise, first_frame and the engine's other inputs what applies. `inspect` names "
        "the inputs.",
    ),
    click.option(
        "--negative", help="What the video keeps away from. Default: the model's own text."
    ),
    click.option(
        "--image", type=_FILE, metavar="FILE",
        help="The first frame, for image-to-video and TI2V.",
    ),
    click.option(
        "--last-image", type=_FILE, metavar="FILE",
        help="The last frame, for first-last-frame models.",
    ),
    model_option(
        "The run takes its text encoder, VAE and image encoder. Default: the one that the bundle "
        "came from."
    ),
    *_OUTPUT,
)  # fmt: skip
sampling_options = _adding(  # the fields of Settings
    click.option(
        "--steps", type=COUNT, metavar="NUMBER",
        help="How many steps the loop has. Default: the model's own.",
    ),
    click.option(
        "--shift", type=float, metavar="NUMBER",
        help="How far the timesteps move towards pure noise; 1 leaves them evenly spaced. "
        "Default: the model's own.",
    ),
    click.option(
        "--guidance", metavar="NUMBER[,NUMBER]", callback=parsed(parse_guidance),
        help="How far the text drives the video: one number, or one for low and one for high "
        "noise; 1 is no guidance. Default: the model's own, with --timesteps 1.",
    ),
    click.option(
        "--solver", type=click.Choice(list(SOLVERS)),
        help="The method that makes the next latent from a velocity. Default: unipc, with "
        "--timesteps euler.",
    ),
    click.option(
        "--timesteps", metavar="NUMBER,...", callback=parsed(parse_numbers),
        help="The timesteps of a distilled model, as 1000,750,500,250, in place of --steps and "
        "--shift.",
    ),
    click.option(
        "--recipe", type=click.Choice(list(RECIPES)),
        help="All of these by the name of a distilled model; other options replace its own. "
        "Default: that of the weights set.",
    ),
)  # fmt: skip
_WINDOW = (
    click.option(
        "--window", type=COUNT, metavar="NUMBER",
        help="How many latent frames of a causal video stay in the cache, the sink among them. "
        "Default: all.",
    ),
    click.option(
        "--sink", type=SEED, default=0, show_default=True, metavar="NUMBER",
        help="How many of the first latent frames stay for good; needs a window.",
    ),
    click.option(
        "--max-attention", type=COUNT, metavar="NUMBER",
        help="How many of the latest latent frames in the cache are attended to. Default: all.",
    ),
)  # fmt: skip
window_options = _adding(
    click.option(
        "--chunks", type=COUNT, metavar="NUMBER",
        help="How many chunks of a causal video are made. Default: those of the engine's clip.",
    ),
    *_WINDOW,
)  # fmt: skip
stream_options = _adding(
    click.option("--prompt", help="What the video shows."),
    click.option(
        "--text", "text_file", type=_FILE, metavar="FILE",
        help="Embeddings in place of --prompt: a safetensors file with text [n, 4096], and noise "
        "where it is given.",
    ),
    click.option(
        "--initial", type=_FILE, metavar="FILE",
        help="Latent frames that come before: an X.safetensors of run or stream.",
    ),
    model_option(
        "The stream takes its text encoder and VAE. Default: the one that the bundle came from."
    ),
    *_OUTPUT,
    click.option(
        "--length", type=COUNT, metavar="NUMBER",
        help="How many frames are made: 4k+1. Default: what is left of the engine's own.",
    ),
    *_WINDOW,
    click.option(
        "--independent-first-frame", is_flag=True,
        help="Make the first chunk of one latent frame, for models that were trained so.",
    ),
    click.option(
        "--timesteps", metavar="NUMBER,...", callback=parsed(parse_numbers),
        help="The timesteps of a chunk, as 1000,937.5,833.333,625. Default: the model's own.",
    ),
)  # fmt: skip
_BEST = "what runs best here"
_ENGINE = {  # the fields of EngineOptions
    "backend": click.option(
        "--backend", type=click.Choice(BACKENDS), help=f"The engine's backend. Default: {_BEST}."
    ),
    "resolution": resolution_option(),
    "frames": frames_option(),
    "chunk": chunk_option(),
    "cache": cache_option(),
    "dtype": dtype_option(_BEST),
    "device": device_option(_BEST),
    "weights": click.option(
        "--weights", metavar="NAME|FOLDER|FILE",
        help="The weights that the engine reads: a set of the bundle, or others of the same "
        "layout. Default: base.",
    ),
    "attention": attention_option("the one that the build chose"),
    "offload": click.option(
        "--offload", type=click.Choice(OFFLOADS),
        help="What a GPU that does not hold all weights holds by turns: one of two experts, "
        "replaced at the switch, or blocks, copied from memory while others run. Default: whatever "
        "fits, and a warning where that is not all.",
    ),
    "resident_blocks": click.option(
        "--resident-blocks", type=click.IntRange(min=0), metavar="NUMBER",
        help="How many blocks stay on the GPU with --offload blocks. Default: as many as leave "
        "room for a forward and the VAE.",
    ),
    "cuda_graph": click.option(
        "--cuda-graph/--no-cuda-graph", default=None,
        help="Replay a captured CUDA graph, or launch each kernel. Default: a graph where "
        "launching takes as long as running.",
    ),
    "provider": click.option(
        "--provider", type=click.Choice(list(PROVIDERS)),
        help="ONNX Runtime's execution provider. Default: cuda on a GPU, else cpu.",
    ),
    "provider_options": click.option(
        "--provider-option", "provider_options", multiple=True, metavar="KEY=VALUE",
        callback=parsed(parse_pairs),
        help="An option of the execution provider. It may be repeated.",
    ),
}  # fmt: skip
engine_options = _adding(*_ENGINE.values())
# bench and profile name backends as arms, and bench takes no causal model.
profile_options = _adding(*(own for name, own in _ENGINE.items() if name != "backend"))
bench_options = _adding(
    *(own for name, own in _ENGINE.items() if name not in ("backend", "chunk", "cache"))
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
