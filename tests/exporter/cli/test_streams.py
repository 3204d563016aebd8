"""Where a command's output goes: a reader that left, a full device, nowhere."""

import os
import subprocess
import sys

import pytest

from tests.quick import slow_but
from wanexport.exporter.cli.streams import minding_the_reader
from wanexport.runtime.errors import WanExportError

CLOSED = "error: standard output is closed: give it a file, or /dev/null\n"
FULL = "error: cannot write to standard output (No space left on device): send it elsewhere\n"


@pytest.mark.parametrize("unbuffered", slow_but(["", "1"], ""))
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{0} --help | true", 141, ""),
        ("{0} inspect --help | true", 141, ""),
        ("{0} inspect / 2>&1 | true", 141, ""),
        ("{0} inspect / | true", 2, "error: / is no bundle"),
        ("{0} --version >&-", 2, CLOSED),
        ("{0} inspect / 2>&-", 2, ""),
        ("{0} --help >/dev/full", 2, FULL),
        ("{0} inspect --help >/dev/full", 2, FULL),
    ],
)
def test_the_exit_code_and_the_line_of_an_output_that_takes_nothing(
    shell: str, code: int, said: str, unbuffered: str
) -> None:
    command = shell.format(f"{sys.executable} -m wanexport.exporter.cli.main")
    child = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout) == (code, "")
    assert child.stderr.startswith(said) and child.stderr.count("\n") == (1 if said else 0)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_reader_that_leaves_a_long_report_is_no_failed_check(as_json: bool) -> None:
    code = (
        "from wanexport.exporter.cli import main, terminal\n"
        "from wanexport.exporter.cli.streams import minding_the_reader\n"
        "show = lambda record: terminal.out.print(record)\n"
        f"with minding_the_reader(): main._report('x' * 10**6, {as_json}, show)\n"
    )
    command = f'{sys.executable} -c "$CODE" | head -c 10'
    child = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "CODE": code, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stderr) == (141, "")


def test_a_pipe_to_another_process_that_broke_is_one_line() -> None:
    with pytest.raises(WanExportError, match="talked to has ended"), minding_the_reader():
        raise BrokenPipeError(32, "Broken pipe")
