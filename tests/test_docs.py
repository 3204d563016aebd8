"""README and docs/ say what is there: options, links, files, commands and Python examples.

Nothing that they show is run here: `test_readme` and `test_docs_run` do that.
"""

import importlib
import re
from itertools import pairwise

import click
import pytest

from tests.documents import ROOT, Document, document, documents, words_of
from tests.python_examples import faults
from tests.tables import options
from wanexport.exporter.cli.main import cli

DOCUMENTS = documents()
EACH = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
OF_DOCS = [page for page in DOCUMENTS if page.name.startswith("docs/")]
EACH_OF_DOCS = pytest.mark.parametrize("page", OF_DOCS, ids=lambda page: page.name)
# Written by hand in columns, or by another rule.
AS_THEY_ARE = {"docs/architecture.md", "docs/checkpoints.md"}
PLAIN = [page for page in DOCUMENTS if page.name not in AS_THEY_ARE]
EACH_PLAIN = pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.name)
LONGEST_LINE, LONGEST_PARAGRAPH = 105, 5
# What other programs take, and scripts of tests/tables/.
OTHERS_OPTIONS = {"--minutes"}
FILES = ("--text", "--initial", "--calls", "--outputs", "--lora")  # options whose value is read
FOLDERS = ("exporter", "graphs", "runtime", "samples", "tests", "docs")


def test_every_command_has_its_options_in_one_page() -> None:
    tables = [name for page in DOCUMENTS for name in options.tables_of(page.text)]
    assert sorted(tables) == sorted(cli.commands)


@EACH
def test_the_tables_of_options_are_those_of_the_command_line(page: Document) -> None:
    """`python -m tests.tables.options --write` brings them up to date."""
    assert options.filled(page.text) == page.text


def test_a_table_has_every_option_in_the_order_of_the_help() -> None:
    for name, command in cli.commands.items():
        with click.Context(command, info_name=name) as context:
            shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", command.get_help(context), re.MULTILINE)
        rows = re.findall(r"^\| (?:`-\w`, )?`(--[\w-]+)`", options.table(name), re.MULTILINE)
        assert [*rows, "--help"] == shown
        assert all(row.count(" | ") == 3 for row in options.table(name).splitlines()[2:])


def test_a_table_says_value_default_and_meaning_of_an_option() -> None:
    @click.command("made")
    @click.option("--kind", type=click.Choice(["a", "b"]), help="Which one. Default: a on a GPU.")
    @click.option("-n", "--number", type=click.IntRange(1, 5), default=3, show_default=True)
    @click.option("--file", metavar="A|B", required=True, help="What is read.")
    @click.option("--pair", metavar="N[,N]", help="One or two.")
    @click.option("--quick", is_flag=True, help="In a hurry.")
    @click.option("--on/--off", default=None, help="Either. Default: as it was.")
    def made() -> None:
        pass

    assert options.table_of(made).splitlines()[2:] == [
        "| `--kind` | `a`, `b` | a on a GPU | Which one. |",
        "| `-n`, `--number` | `INTEGER`, 1 to 5 | 3 |  |",
        "| `--file` | `A`, `B` | required | What is read. |",
        "| `--pair` | `N[,N]` |  | One or two. |",
        "| `--quick` |  | off | In a hurry. |",
        "| `--on`, `--off` |  | as it was | Either. |",
    ]


@EACH
def test_every_link_leads_somewhere(page: Document) -> None:
    for link in page.links:
        place, _, anchor = link.partition("#")
        target = (ROOT / page.name).parent / place if place else ROOT / page.name
        assert target.exists(), link
        if anchor:
            name = target.resolve().relative_to(ROOT).as_posix()
            assert anchor in document(name).anchors, link


def test_the_readme_leads_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in document("README.md").links}
    assert {page.name for page in DOCUMENTS} - {"README.md"} <= linked


@EACH
def test_every_command_is_one_that_click_takes(page: Document) -> None:
    for line in page.commands("bash", "sh"):
        for words in words_of(line, "wanexport"):
            parse(words)


@EACH_OF_DOCS
def test_a_command_reads_what_one_before_it_made(page: Document) -> None:
    assert unmade(page) == set()


def test_a_name_that_no_command_made_is_found() -> None:
    shown = "wanexport run tiny --text a.safetensors -o b.mp4\nwanexport compare small/x -m model\n"
    assert unmade(Document("docs/x.md", f"```bash\n{shown}```\n")) == {
        "a.safetensors", "small", "model",
    }  # fmt: skip


@EACH
def test_a_command_in_the_prose_has_only_options_that_are_there(page: Document) -> None:
    for span in page.spans:
        for words in words_of(span, "wanexport"):
            if words and words[0] in cli.commands:
                given = {word.partition("=")[0] for word in words if word.startswith("--")}
                assert given <= set(names_of(cli.commands[words[0]])), span


@EACH
def test_every_option_in_the_prose_is_there(page: Document) -> None:
    known = {name for command in cli.commands.values() for name in names_of(command)}
    named = {word for span in page.spans for word in re.findall(r"^--[a-z][a-z0-9-]*", span)}
    assert named - known <= OTHERS_OPTIONS


def test_a_command_that_click_does_not_take_is_found() -> None:
    for wrong in ("run tiny", "build --resolution 64x96 --frames 9 --no-such", "compile x"):
        with pytest.raises(click.UsageError):
            parse(wrong.split())
    assert list(words_of("A=1 wanexport lint x --json | head", "wanexport")) == [
        ["lint", "x", "--json"]
    ]
    assert list(words_of("wanexport doctor  # wanexport run", "wanexport")) == [["doctor"]]


@EACH
def test_every_file_and_module_that_is_named_is_there(page: Document) -> None:
    for span in page.spans:
        for name in paths_in(span):
            assert list(ROOT.glob(name)), name
        for name in re.findall(r"python -m ((?:tests|samples)[\w.]+)", span):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
        for name in re.findall(r"^wanexport(?:\.\w+)+", span):
            assert has(name), name


@EACH
def test_every_target_of_make_that_is_named_is_there(page: Document) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in (*page.spans, *page.commands("bash", "sh")):
        if command.startswith("make "):
            assert command.split()[1] in targets


def test_a_file_that_is_not_there_is_found() -> None:
    assert paths_in("exporter/none.py") == ["exporter/none.py"]
    assert paths_in("python samples/01.py FILE") == ["samples/01.py"]
    assert not paths_in("engines/64x96x9/ or 480x832/81")
    assert has("wanexport.runtime.load.load") and not has("wanexport.runtime.none")


@EACH_PLAIN
def test_lines_and_paragraphs_are_short(page: Document) -> None:
    lines = [line for line in page.prose.splitlines() if not line.startswith(("|", "<!--", "!["))]
    assert not [line for line in lines if len(line) > LONGEST_LINE]
    assert not [lines for lines in page.paragraphs() if len(lines) > LONGEST_PARAGRAPH]


@EACH
def test_no_figure_is_left_open(page: Document) -> None:
    prose = re.sub(r"`[^`]*`", "", page.prose)  # names of variables stand in code
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b|\b(?:TODO|TBD|XXX)\b", prose)


@pytest.mark.parametrize(
    "source",
    [block for page in DOCUMENTS for block in page.blocks("python", "py")],
    ids=[f"{p.name}-{n}" for p in DOCUMENTS for n, _ in enumerate(p.blocks("python", "py"))],
)
def test_a_python_example_names_only_what_is_there(source: str) -> None:
    assert faults(source) == []


OPENED = "from wanexport.runtime import load, sample\nd = load('x')\n"
SERVING = (
    "from wanexport.runtime.serving.pipeline import Pipeline\nwith Pipeline('x') as p:\n    job = "
)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from wanexport.runtime import none", "wanexport.runtime has no none"),
        ("import wanexport.none", "there is no module wanexport.none"),
        (OPENED + "load('x', size=1)", "load takes no size"),
        (OPENED + "load()", "load needs bundle"),
        (OPENED + "load('x', 'y')", "load takes 1 arguments by position"),
        (OPENED + "d.swap('x')", "Denoiser has no swap"),
        (OPENED + "d.session(prompt=1)", "session takes no prompt"),
        (OPENED + "d.session(text=1)(late=1)", "__call__ takes no late"),
        (OPENED + "for s in sample(d, noise=1, text=1):\n    s.number", "Step has no number"),
        (OPENED + "print(e)", "e is not defined"),
        (SERVING + "p.submit('a', sed=1)", "submit takes no sed"),
        (SERVING + "p.submit('a')\n    job.result().pixels", "Generation has no pixels"),
        (SERVING + "p.denoiser.shape", ""),
    ],
)
def test_what_an_example_gets_wrong_is_found(source: str, fault: str) -> None:
    assert faults(source) == ([fault] if fault else [])


def unmade(page: Document) -> set[str]:
    """What the commands of a page of docs/ read though none before has made it.

    The first command of docs/build.md is before all of them. A sample makes what it names.
    """
    made, missing = {"tiny"}, set[str]()
    for line in page.commands("bash"):
        for script, *words in words_of(line, "python"):
            made |= {*words, *re.findall(r'"([\w.]+)"', (ROOT / script).read_text())}
        for command, *words in words_of(line, "wanexport"):
            options = [*pairwise(words)]
            read = [value for option, value in options if option in FILES]
            if command not in ("build", "doctor"):
                read += [*words[:1], *(value for option, value in options if option == "-m")]
            missing |= {re.split("[/:]", name)[0] for name in read} - made
            made |= {value for option, value in options if option == "-o"}
    return missing


def parse(words: list[str]) -> None:
    """Parse a command's words. Raises UsageError for what click does not take."""
    with click.Context(cli, info_name="wanexport") as context:
        name, command, rest = cli.resolve_command(context, words)
        assert command is not None
        command.make_context(name, rest, parent=context)


def names_of(command: click.Command) -> list[str]:
    """Every name of a command's options."""
    parameters = command.get_params(click.Context(command))
    return [name for option in parameters for name in (*option.opts, *option.secondary_opts)]


def paths_in(span: str) -> list[str]:
    """Paths of this repository in code: those that begin with one of its folders."""
    first = "|".join(FOLDERS)
    return re.findall(rf"(?<![\w./-])(?:{first})/[\w./*-]*\w/?(?![\w*])", span)


def has(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        importlib.import_module(name)
        return True
    except ImportError:
        module, _, attribute = name.rpartition(".")
        return bool(module) and hasattr(importlib.import_module(module), attribute)
