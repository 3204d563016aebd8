"""Other programs end with the one that started them, and say how they ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.exporter.child.killed_parents import BUILDS, alive, kill_after, kill_build
from tests.quick import slow_but
from wanexport.exporter.child.process import Lifeline, environment_of, last_words, run_command
from wanexport.runtime.errors import WanExportError

SHELL = ["sh", "-c"]


@pytest.mark.parametrize(
    "seconds", slow_but([0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3], 0.005, 0.04, 0.3)
)
def test_nothing_outlives_a_parent_that_is_killed(seconds: float, tmp_path: Path) -> None:
    left, wrote = kill_after(seconds, tmp_path / "folder")
    assert not left and not wrote


@pytest.mark.parametrize(("backend", "child"), slow_but(BUILDS, "aoti"))
def test_nothing_outlives_a_build_that_is_killed(backend: str, child: str, tmp_path: Path) -> None:
    left, wrote = kill_build(backend, child, 0.1, tmp_path)
    assert not left and not wrote


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -11 $$", -11), ("kill -2 $$", -2)],
)
def test_an_exit_status_is_passed_on(script: str, code: int) -> None:
    assert run_command([*SHELL, script]).code == code


def test_output_and_errors_are_told_apart() -> None:
    lines: list[str] = []
    script = "echo one; echo two; echo three >&2"
    ended = run_command([*SHELL, script], on_line=lines.append)
    assert (lines, ended.output, ended.errors) == (["one\n", "two\n"], "", "three\n")
    assert run_command([*SHELL, script]).output == "one\ntwo\n"


def test_errors_of_any_length_do_not_block_the_output() -> None:
    code = (
        "import sys\nfor _ in range(3): print('line', flush=True); sys.stderr.write('x' * 300_000)"
    )
    ended = run_command([sys.executable, "-S", "-c", code])
    assert ended.output == "line\n" * 3 and len(ended.errors) == 900_000


def test_what_a_program_leaves_running_ends_with_it(tmp_path: Path) -> None:
    word = str(tmp_path / "left")
    leave = (
        f"(trap '' TERM HUP; exec -a {word} sleep 60) & setsid sh -c 'exec -a {word} sleep 60' &"
    )
    assert run_command(["bash", "-c", f"{leave} sleep 0.1; echo done"]).output == "done\n"
    assert not alive(word)


def test_a_program_out_of_time_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    word = str(tmp_path / "left")
    script = f"setsid bash -c 'exec -a {word} sleep 60' & exec -a {word} sleep 60"
    with pytest.raises(TimeoutError, match=r"took over 0\.5 s"):
        run_command(["bash", "-c", script], timeout=0.5)
    assert not alive(word)


def test_programs_of_one_lifeline_end_with_its_block(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    word, started = str(tmp_path / "left"), time.monotonic()

    def run(line: Lifeline) -> int:
        command = ["bash", "-c", f"exec -a {word} sleep 60"]
        return run_command(command, lifeline=line, folders=[tmp_path / "folder"]).code

    with ThreadPoolExecutor(3) as pool, Lifeline() as line:
        running = [pool.submit(run, line) for _ in range(3)]
        while len(alive(word)) < 3:
            time.sleep(0.01)
    assert [future.result() for future in running] == [-signal.SIGKILL] * 3
    assert time.monotonic() - started < 30 and not alive(word)
    assert not (tmp_path / "folder").exists()
    with pytest.raises(WanExportError, match="another process of this command failed"):
        line.start(["true"], os.environ, [])


def test_a_program_that_is_not_there_is_no_exit_code() -> None:
    with pytest.raises(FileNotFoundError, match="there is no program /nonexistent/g"):
        run_command(["/nonexistent/g++"])


def test_ctrl_c_ends_the_program_too(tmp_path: Path) -> None:
    word = str(tmp_path / "left")
    script = f"exec -a {word} sleep 60"
    code = (
        "from wanexport.exporter.child.process import run_command\n"
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it\n"
        f"run_command(['bash', '-c', {script!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as parent:
        while not alive(f"{word}\0"):
            time.sleep(0.01)
        parent.send_signal(signal.SIGINT)
        parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGINT
    assert not alive(f"{word}\0")


def test_many_threads_run_programs_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        said = pool.map(lambda i: run_command([*SHELL, f"echo {i}"]).output, range(24))
        assert list(said) == [f"{i}\n" for i in range(24)]
    assert threading.active_count() < 12


def test_caches_and_temporary_files_of_a_child_lie_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    found = environment_of(tmp_path)
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(found[name]).is_relative_to(tmp_path)


def test_a_user_without_name_or_home_gets_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    found = environment_of(tmp_path)
    assert found["USER"] == f"uid{os.getuid()}" and found["HOME"] == str(tmp_path)
    monkeypatch.setenv("LOGNAME", "somebody")
    monkeypatch.setenv("HOME", str(tmp_path / ".."))
    found = environment_of(tmp_path)
    assert "USER" not in found and found["HOME"] == str(tmp_path / "..")


def test_last_words_name_the_exception() -> None:
    errors = "Traceback:\ntorch.OutOfMemoryError: CUDA out of memory.\nSee the documentation\n\n"
    assert last_words(1, errors) == "torch.OutOfMemoryError: CUDA out of memory."
    assert last_words(2, "error: plain words\n") == "error: plain words"
    assert last_words(3, "") == "exit code 3"
    assert last_words(-9, "") == "its process was killed: out of memory?"
