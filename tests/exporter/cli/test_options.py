"""What a user types into an option, or a script leaves empty: refused by the option's name."""

import re
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from wanexport.exporter.cli.main import cli
from wanexport.exporter.cli.options import (
    DEVICE,
    parse_names,
    parse_numbers,
    parse_pairs,
    parse_size,
)
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import WanExportError

VALUES = [
    (name, parameter)
    for name, command in cli.commands.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False) and parameter.name != "negative"
]


def with_value(command: str, parameter: click.Parameter, value: str) -> list[str]:
    """The command's words, what it requires among them, with a value for one of its parameters."""
    words = [command]
    for one in cli.commands[command].params:
        given = value if one is parameter else "1"
        if one is parameter or one.required:
            words += [given] if isinstance(one, click.Argument) else [one.opts[-1], given]
    return words


@pytest.mark.parametrize("blank", ["", " \t"])
@pytest.mark.parametrize(("command", "parameter"), VALUES, ids=lambda p: getattr(p, "name", p))
def test_an_empty_value_is_refused_by_name(
    command: str, parameter: click.Parameter, blank: str
) -> None:
    with pytest.raises(click.BadParameter) as refusal:
        cli(with_value(command, parameter, blank), standalone_mode=False)
    message = refusal.value.format_message()
    is_option = isinstance(parameter, click.Option)
    assert (parameter.opts[-1] if is_option else f"'{parameter.opts[-1].upper()}'") in message
    assert "it is empty, as a variable that was never set: give a value" in message
    assert message.endswith("or leave it out") is not parameter.required


def test_an_empty_negative_prompt_is_one() -> None:
    words = ["run", "nowhere", "--prompt", "x", "--negative", "", "-o", "x.mp4"]
    with pytest.raises(WanExportError, match=r"nowhere is no bundle"):
        cli(words, standalone_mode=False)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("command", "parameter"),
    [(c, p) for c, p in VALUES if isinstance(p.type, click.types.FloatParamType)],
)
def test_a_number_that_is_none_is_refused_by_name(
    command: str, parameter: click.Parameter, value: str
) -> None:
    with pytest.raises(click.BadParameter, match=r"finite number|not in the range"):
        cli(with_value(command, parameter, value), standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench b --rounds 4", "'--rounds': 4 is not in the range x>=5"),
        ("run b --prompt x -o x.mp4 --steps 0", "'--steps': 0 is not in the range x>=1"),
        ("run b --prompt x -o x.mp4 --frames 1.5", "'--frames': '1.5' is not a valid integer"),
        ("run b --prompt x -o x.mp4 --seed -1", "'--seed': -1 is not in the range x>=0"),
        ("build --resolution 64x96 --frames 9 --optimization-level 9", "9 is not in the range"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(words: str, said: str) -> None:
    result = CliRunner().invoke(cli, words.split())
    assert result.exit_code == 2 and said in result.output


@pytest.mark.parametrize(
    ("command", "lacks"),
    [
        ("run", set()),
        ("stream", set()),
        ("compare", set()),
        ("bench", {"backend", "chunk", "cache"}),  # which takes no causal engine
        ("profile", {"backend"}),
    ],
)
def test_every_option_of_load_is_one_of_the_commands(command: str, lacks: set[str]) -> None:
    named = {parameter.name for parameter in cli.commands[command].params}
    assert {field.name for field in fields(EngineOptions)} - named == lacks


def words_of(command: str, option: str) -> str:
    """What the help of a command says of an option, without its default and -m's own sentence."""
    options = [p for p in cli.commands[command].params if isinstance(p, click.Option)]
    (said,) = (p.help or "" for p in options if option in p.opts)
    said = said.partition(" Default: ")[0]
    return said.partition(". ")[0] if option == "--model" else said


@pytest.mark.parametrize(
    ("option", "commands"),
    [
        *((f"--{name}", "build run compare bench") for name in ("resolution", "frames", "dtype")),
        *((f"--{name}", "build run stream compare profile") for name in ("chunk", "cache")),
        ("--device", "build run compare bench"),
        ("--attention", "build run compare bench"),
        ("--weights", "run compare bench"),
        ("--model", "build run compare"),
        ("--report", "compare bench"),
        ("--steps", "run compare"),
        ("--json", "build run compare bench lint inspect doctor"),
    ],
)
def test_an_option_means_the_same_in_every_command(option: str, commands: str) -> None:
    said = {words_of(command, option) for command in commands.split()}
    assert len(said) == 1 and said != {""}


def test_every_option_is_explained_in_sentences() -> None:
    for name, command in cli.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                assert re.fullmatch(r"[A-Z].*\.", option.help or ""), (name, option.name)


def test_checkpoints_are_named_alike_and_what_is_taken_is_said() -> None:
    said = "The model's checkpoint: a folder, a file or a hub id. "
    for name, taken in (("build", "weights"), ("run", "VAE"), ("compare", "tensors")):
        (option,) = (p for p in cli.commands[name].params if p.name == "model")
        assert isinstance(option, click.Option) and option.help
        assert option.help.startswith(said) and taken in option.help.removeprefix(said)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:11"])
def test_a_device_is_named_as_pytorch_does(device: str) -> None:
    assert DEVICE.convert(device, None, None) == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0"])
@pytest.mark.parametrize("command", ["build --resolution 1 --frames 1", "compare b", "bench b"])
def test_another_name_is_no_device(command: str, device: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "--device", device])
    assert result.exit_code == 2
    assert "--device" in result.output and "cuda:N" in result.output


def test_help_has_options_in_the_order_in_which_they_are_written() -> None:
    text = CliRunner().invoke(cli, ["run", "--help"]).output
    names = ("--prompt", "--seed", "--steps", "--timesteps", "--backend", "--weights", "--json")
    places = [text.index(f"  {name} ") for name in names]
    assert places == sorted(places)


def test_sizes_in_bytes() -> None:
    assert parse_size("--workspace", "8GiB") == 8 * 2**30
    assert parse_size("--workspace", "1.5 mb") == 1_500_000
    assert parse_size("--workspace", "1048576") == 2**20
    assert parse_size("--workspace", None) is None
    for text in ("0", "8", "-1GB", "1e3GB", "1.2.3GB", ".GB", "nan", "9" * 400, "9000PB", "GiB"):
        with pytest.raises(WanExportError, match=r"--workspace .*: expected a size from 1MiB"):
            parse_size("--workspace", text)


def test_pairs_of_a_key_and_a_value() -> None:
    assert parse_pairs("--o", ["a=1", " b = 2=3 ", "a=1"]) == {"a": "1", "b": "2=3"}
    assert parse_pairs("--o", []) is None
    for text in ("=", "a=", "=1", " = 1", "a", "a= "):
        with pytest.raises(WanExportError, match=r"expected KEY=VALUE"):
            parse_pairs("--o", [text])
    with pytest.raises(WanExportError, match=r"--o names a twice: 1 and 2"):
        parse_pairs("--o", ["a=1", "a=2"])


def test_names_with_commas_between() -> None:
    assert parse_names("--target", " sm89, sm120") == ["sm89", "sm120"]
    assert parse_names("--target", None) is None
    for text in (",", "sm89,", "sm89,,sm120"):
        with pytest.raises(WanExportError, match=r"--target .* has an empty name"):
            parse_names("--target", text)


def test_numbers_with_commas_between() -> None:
    assert parse_numbers("--timesteps", "1000, 0.5") == [1000, 0.5]
    for text in ("", ",", "1,", "1;2", "1 2", "nan", "inf,1", "1e999"):
        with pytest.raises(WanExportError, match=r"expected numbers, with commas between"):
            parse_numbers("--timesteps", text)
