"""Why a child failed is told in one line; of what nobody foresaw, the whole is kept in a file."""

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from wanexport.exporter.child import child, process
from wanexport.exporter.child.child import known, run_process, temporary_folder
from wanexport.runtime.errors import WanExportError

RESULT = {"answer": 1}


@dataclass(frozen=True)
class Job:
    """Python code to run where the child's work would be."""

    code: str


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that a child may be, which does what its job says."""
    package = tmp_path / "modules" / "wanexport_stub"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "stub.py").write_text(
        "import sys\n"
        "from wanexport.exporter.child.child import main, tell\n"
        "def work(job):\n"
        "    exec(job['code'], globals())\n"
        f"    return {RESULT!r}\n"
        "main(sys.argv[1], work)\n"
    )
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    run = process.run_command

    def run_stub(command: list[str], **options: Any) -> Any:
        return run(
            [a.replace("wanexport.exporter.", "wanexport_stub.") for a in command], **options
        )

    monkeypatch.setattr(child, "run_command", run_stub)
    return "stub"


def failure(stub: str, code: str) -> str:
    with pytest.raises(WanExportError) as raised:
        run_process(stub, Job(code))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_child_gives_its_progress_and_result_whatever_libraries_print(stub: str) -> None:
    code = (
        "import atexit, os\n"
        "print('no newline', end='')\n"
        "tell('stage', 1, 2)\n"
        "os.write(1, b'half a line')\n"
        "atexit.register(print, 'goodbye')\n"
        "print('{\"progress\": [1]}')\n"
    )
    told: list[tuple[str, int, int]] = []
    assert run_process(stub, Job(code), progress=lambda *step: told.append(step)) == RESULT
    assert told == [("stage", 1, 2)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from wanexport.runtime.errors import WanExportError as E; raise E('in plain words')",
         r"in plain words$"),
        ("open('/nonexistent/file')", r"/nonexistent/file: No such file or directory$"),
        ("raise OSError(28, 'No space left on device', '/full/file')",
         r"/full/file takes no more \(No space left on device\): free some space there, or set TM"),
        ("raise OSError(28, 'No space left on device')", rf"{tempfile.gettempdir()} takes no more"),
        ("try: raise OSError(122, 'Disk quota exceeded')\n"
         "except OSError as e: raise RuntimeError('x') from e", r".* takes no more \(Disk quota"),
        ("raise RuntimeError('cc1plus: error writing to /t: No space left on device\\nmore')",
         rf"{tempfile.gettempdir()} takes no more \(No space left on device\)"),
        ("raise MemoryError", r"out of memory"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate')", r"out of memory \(CUDA"),
        ("import no_such_library", r"a library does not import \(No module named 'no_such_lib"),
        ("import os; os.kill(os.getpid(), 9)", r"stub: its process was killed: out of memory\?$"),
        ("import os; os.kill(os.getpid(), 11)", r"stub: its process died of signal 11; please rep"),
        ("sys.exit(2)", r"stub failed \(exit code 2\)"),
        ("import os; os._exit(0)", r"stub failed \(exit code 0\)"),
        ("{}['key']", r"stub failed \(KeyError: 'key'\): .*report it with /.*\.log$"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line(stub: str, code: str, message: str) -> None:
    assert re.match(message, failure(stub, code))


def test_what_nobody_foresaw_is_kept_whole(stub: str) -> None:
    message = failure(stub, "print('a hint', file=sys.stderr)\nraise KeyError('x')")
    log = Path(message.rpartition(" ")[2])
    text = log.read_text()
    log.unlink()
    assert "a hint" in text and "Traceback" in text and text.rstrip().endswith("KeyError: 'x'")


def test_a_failure_leaves_no_temporary_folder(
    stub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    failure(stub, "open('/nonexistent/file')")
    failure(stub, "import os; os.kill(os.getpid(), 9)")
    assert run_process(stub, Job("open(sys.argv[1] + '.more', 'w').close()")) == RESULT
    assert not list((tmp_path / "t").iterdir())


def test_a_folder_for_temporary_files_that_cannot_be_had_is_named(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(WanExportError, match=r"/nonexistent.*: set TMPDIR to"), temporary_folder():
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_folder_for_temporary_files_is_named(
    tmp_path: Path, stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a small disk be mounted")
    try:
        monkeypatch.setattr("tempfile.tempdir", str(small))
        write = (
            "import tempfile, pathlib\n"
            "pathlib.Path(tempfile.gettempdir(), 'f').write_bytes(bytes(10**6))"
        )
        message = f"{small} takes no more (No space left on device): free some space"
        assert failure(stub, write).startswith(message)
        (small / "filler").write_bytes(bytes(64 << 10))
        assert failure(stub, write).startswith(message)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_cause_of_a_failure_is_looked_for_in_what_led_to_it() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/a")
        except OSError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        assert str(known(error)).startswith("/a takes no more")
    assert known(KeyError("x")) is None


def test_run_by_hand_a_child_says_why_on_standard_error(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({}))
    code = (
        "from wanexport.exporter.child.child import main\n"
        "from wanexport.runtime.errors import WanExportError\n"
        "def work(job): raise WanExportError('in plain words')\n"
        f"main({str(tmp_path / 'job.json')!r}, work)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "in plain words\n")
