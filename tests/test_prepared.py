# SPDX-License-Identifier: Apache-2.0
"""A process from the prepared one is what a fresh one would be, and none is left behind."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.prepared import Launched, Server
from tests.processes import environment, launched, run, start

pytestmark = pytest.mark.slow

SAYS = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["RANK"], __name__, len(sys.stdin.read()), os.getsid(0) == os.getpid())
print("an error", file=sys.stderr)
sys.exit(3)
"""
SLEEPS = "import time; time.sleep(100)"


@pytest.mark.parametrize("fresh", [False, True])
def test_words_folder_environment_streams_and_status(fresh, tmp_path):
    words = [sys.executable, "-c", SAYS, "one", "two"]
    done = run(words, fresh=fresh, input="é" * 7, cwd=tmp_path, env={"RANK": "5"})
    assert done.stdout == f"['-c', 'one', 'two'] {tmp_path} 5 __main__ 7 True\n"
    assert (done.stderr, done.returncode) == ("an error\n", 3)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("code, status", [("pass", 0), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_how_it_ends(code, status, fresh):
    done = run([sys.executable, "-c", code], fresh=fresh)
    assert done.returncode == status and ("ZeroDivisionError" in done.stderr) == (status == 1)


@pytest.mark.parametrize("fresh", [False, True])
def test_scripts_and_modules(fresh, tmp_path):
    """With what lies beside them."""
    (tmp_path / "beside.py").write_text("VALUE = 7")
    (tmp_path / "own.py").write_text("import sys, beside; print(__name__, beside.VALUE, sys.argv[1:])")
    for words, folder in ([str(tmp_path / "own.py")], "/"), (["-m", "own"], tmp_path):
        assert run([sys.executable, *words, "a"], fresh=fresh, cwd=folder).stdout == "__main__ 7 ['a']\n"


def test_a_crash_and_a_time_limit_show_stacks():
    with pytest.raises(AssertionError, match=r'crashes(?s:.*)File "<string>", line 1'):
        run([sys.executable, "-c", "import os; os.abort()"])
    with pytest.raises(AssertionError, match=r'takes over 1 s(?s:.*)File "<string>", line 1'):
        run([sys.executable, "-c", SLEEPS], timeout=1)


def test_what_needs_a_fresh_interpreter_gets_one(monkeypatch):
    """Options of Python, other programs, and variables that an import may read."""
    for words, env in (["-u", "-c", "pass"], {}), (["-c", "pass"], {"TRANSFORMERS_VERBOSITY": "error"}):
        with start([sys.executable, *words], environment() | env) as process:
            assert not isinstance(process, Launched)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # as a run in this process may: it is no affair of others
    with start([sys.executable, "-c", "pass"], environment() | {"RANK": "0"}) as process:
        assert isinstance(process, Launched)


def test_a_server_takes_what_it_has_launched_along():
    server = Server(environment())
    with Launched(server, [sys.executable, "-c", SLEEPS], environment()) as process:
        server.process.kill()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{process.pid}").exists():
            assert time.monotonic() < deadline, "it is left behind"
            time.sleep(0.01)
        assert process.wait(20) == -signal.SIGKILL
    with pytest.raises(AssertionError, match="has not started"):
        Launched(server, [sys.executable, "-c", "pass"], environment())


def test_the_first_rank_that_fails_ends_the_others(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os, sys, time\n"
        "print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')), flush=True)\n"
        "sys.exit(4) if os.environ['RANK'] == '1' else time.sleep(100)\n"
    )
    done = run([*launched(2), str(tmp_path / "own.py")], timeout=60)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == ["0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]
    (tmp_path / "own.py").write_text("import os; print(os.environ['RANK'])")
    done = run([*launched(2), str(tmp_path / "own.py")])
    assert done.returncode == 0 and sorted(done.stdout.split()) == ["0", "1"]
