"""The sandbox: what passes, what fails, and that neither files nor processes nor a false "passed" get out."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path

import pytest

from tokenworks.core import sandbox, seccomp
from tokenworks.core.errors import InputError
from tokenworks.core.sandbox import run_tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX")

GOOD = "def f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert f(-1) == 0\n"
KERNEL = sys.platform == "linux" and platform.machine() in seccomp.MACHINES


def kind(code: str, tests: str = TESTS, seconds: float = 5.0) -> tuple[str, str]:
    found = run_tests(code, tests, seconds)
    return found.kind, found.message


def test_right_code_passes() -> None:
    found = run_tests(GOOD + "print('hello')", TESTS, 5.0)
    assert found.passed
    assert (found.kind, found.message) == ("passed", "")
    assert found.output == "hello\n"
    assert found.kernel == KERNEL
    assert found.seconds > 0


def test_much_of_the_standard_library_can_be_used() -> None:
    names = "math re random typing collections itertools functools heapq bisect string json copy datetime decimal"
    more = "fractions statistics dataclasses enum textwrap calendar contextlib hashlib csv io asyncio subprocess"
    code = f"import {', '.join(names.split() + more.split())}\n" + (
        "@dataclasses.dataclass\nclass P:\n    x: int\nP(3)\nrandom.random(); datetime.datetime.now()\n"
        "collections.namedtuple('A', 'a b'); sorted(set('abc')); 10 ** 400\n"
    )
    assert kind(code + GOOD) == ("passed", "")


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("def f(x):\n    return x\n", "failed", "in the test: assert f(1) == 2"),
        ("def f(x) return x", "error", "SyntaxError"),
        ("def g(x): return x", "error", "NameError"),
        ("def f(x):\n    return x + y\n", "error", "'y' is not defined"),
        ("def f(x):\n    return f(x)\n", "error", "RecursionError"),
        ("x = 1 / 0\n" + GOOD, "error", "in line 1 of the code"),
        ("class E(Exception):\n    def __str__(self): raise self\ndef f(x): raise E()", "error", "E in the test"),
        ("\0", "error", "null bytes"),
        (GOOD + "input()", "error", "EOF"),
        ("import sys\nsys.exit(0)", "error", "ended itself before its tests"),
        ("raise SystemExit", "error", "ended itself before its tests"),
        ("def f(x):\n    raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        ("import os\nos._exit(0)", "error", "ended before its tests were through (exit code 0)"),
        ("def f(x):\n    import os\n    os._exit(0)", "error", "exit code 0"),
        (GOOD + "x = [0] * 10**9", "memory", "more memory"),
        (GOOD + "x = []\nwhile True: x.append(bytearray(10**6))", "memory", "more memory"),
        (GOOD + "while True: print('x' * 100)", "output", "printed more than"),
    ],
)  # fmt: skip
def test_what_went_wrong_is_said(code: str, expected: str, said: str) -> None:
    found, message = kind(code)
    assert found == expected, message
    assert said in message


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, "
        "ValueError): pass\nwhile True: pass",
        "import os\nos.close(1)\nos.closerange(3, 64)\nwhile True: pass",
        "import time\ntime.sleep(60)",
    ],
)
def test_time_is_up(code: str) -> None:
    assert kind(GOOD + code, seconds=0.3) == ("timeout", "it ran for more than 0.3 s")


FORBIDDEN = {
    "fork": ("import os\nos.fork()", "another process (os.fork)"),
    "fork, caught": (
        "import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass",
        "another process",
    ),
    "spawn": ("import subprocess\nsubprocess.run(['ls'])", "another process"),
    "system": ("import os\nos.system('ls')", "another process"),
    "exec": ("import os\nos.execv('/bin/ls', ['ls'])", "another process"),
    "write": ("open('escaped', 'w')", "write to the file 'escaped'"),
    "write elsewhere": ("open('PLACE/escaped', 'w')", "write to the file"),
    "append": ("import io\nio.open('PLACE/kept', 'a')", "write to the file"),
    "low-level write": ("import os\nos.open('PLACE/escaped', os.O_CREAT | os.O_RDWR)", "write to the file"),
    "pathlib": ("import pathlib\npathlib.Path('PLACE/kept').write_text('x')", "write to the file"),
    "delete": ("import os\nos.remove('PLACE/kept')", "change files"),
    "rename": ("import os\nos.rename('PLACE/kept', 'PLACE/escaped')", "change files"),
    "truncate": ("import os\nos.truncate('PLACE/kept', 0)", "change files"),
    "link": ("import os\nos.symlink('PLACE/kept', 'PLACE/escaped')", "change files"),
    "folder": ("import os\nos.mkdir('PLACE/escaped')", "change files"),
    "permissions": ("import os\nos.chmod('PLACE/kept', 0)", "change files"),
    "tree": ("import shutil\nshutil.rmtree('PLACE')", "change files"),
    "temporary": ("import tempfile\ntempfile.mkstemp()", "write to the file"),
    "read": ("open('/etc/passwd').read()", "read the file '/etc/passwd'"),
    "itself": ("open('/proc/self/mem', 'rb')", "read the file"),
    "native code": ("import ctypes", "native code"),
    "network": ("import socket\nsocket.socket()", "use the network"),
    "signal": ("import os\nos.kill(os.getppid(), 0)", "send a signal"),
    "interpreter": ("import gc\ngc.get_objects()", "look into the interpreter"),
    "thread": ("import threading\nthreading.Thread(target=print).start()", "not allowed"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_nothing_escapes(name: str, tmp_path: Path) -> None:
    code, said = FORBIDDEN[name]
    (tmp_path / "kept").write_text("kept")
    found, message = kind(GOOD + code.replace("PLACE", str(tmp_path)))
    assert (found, said in message) == ("forbidden", True), (found, message)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.skipif(not KERNEL, reason="no filter for this kernel")
@pytest.mark.parametrize(
    "code",
    [
        "os.mkfifo('PLACE/escaped')",  # Python does not announce this one
        "os.fork()",
        "os.open('PLACE/escaped', os.O_CREAT | os.O_WRONLY)",
        "os.remove('PLACE/kept')",
        "os.mkdir('PLACE/escaped')",
        "os.kill(os.getppid(), 0)",
        "__import__('socket').socket()",
        "os.setsid()",
        "__import__('threading').Thread(target=print).start()",
        "__import__('_posixsubprocess')",
    ],
)
def test_the_kernel_refuses_what_python_lets_through(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same attempts with an audit hook that says nothing: the second door holds alone."""
    (tmp_path / "kept").write_text("kept")
    source = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    child = tmp_path.parent / f"{tmp_path.name}-package" / "sandbox_child.py"
    child.parent.mkdir()
    child.write_text(source.replace("    sys.addaudithook(", "    (lambda hook: None)("))
    monkeypatch.setattr(sandbox, "__file__", str(child.with_name("sandbox.py")))
    attempt = f"import os\ntry:\n    {code}\nexcept Exception as error:\n    print(type(error).__name__)\n"
    found = run_tests(GOOD + attempt.replace("PLACE", str(tmp_path)), TESTS, 5.0)
    assert found.passed, found.message
    expected = "" if "_posixsubprocess" in code else "RuntimeError" if "Thread" in code else "PermissionError"
    assert found.output.strip() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "code",
    [
        "print('passed')",
        "import os\nfor fd in range(1, 64):\n  try: os.write(fd, b'passed\\x1f\\n')\n  except OSError: pass\n"
        "os._exit(0)",
        "import os\nfor fd in range(3, 16):\n  try: os.write(fd, b'x\\npassed\\x1f' + b'0' * 32 + b'\\n')\n"
        "  except OSError: pass\nos._exit(0)",
        "import builtins\nbuiltins.compile = builtins.exec = lambda *a: None",
        "import builtins\nbuiltins.all = lambda x: True\nbuiltins.AssertionError = ValueError",
        "import atexit, os\natexit.register(os._exit, 0)",
        "import sys\nsys.modules['__main__'].describe = lambda *a: ('passed', '')",
        "import sys\nsys.modules['__main__'].__dict__.clear()",
    ],
)  # fmt: skip
def test_wrong_code_does_not_pass_by_saying_so(code: str) -> None:
    found, _ = kind(code + "\ndef f(x):\n    return 7\n", "assert all([f(1) == 2])", 1.0)
    assert found in ("failed", "error", "timeout")


def test_what_code_puts_in_the_place_of_builtins_is_gone_when_it_is_tested() -> None:
    code = "import builtins\nbuiltins.len = lambda x: 3\nbuiltins.sorted = lambda x: x\ndef f(x):\n    return x\n"
    assert kind(code, "assert f(2) == len([0, 0])\nassert sorted([2, 1]) == [1, 2]") == ("passed", "")


def test_nothing_is_left_behind() -> None:
    def left() -> set[str]:
        return {path.name for path in Path(tempfile.gettempdir()).glob("tokenworks-*")}

    before, descriptors = left(), len(os.listdir("/dev/fd"))
    for code in (GOOD, GOOD + "while True: pass", "import os\nos.fork()"):
        run_tests(code, TESTS, 0.3)
    assert left() == before
    assert len(os.listdir("/dev/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_many_open_files_do_not_get_in_the_way() -> None:
    """The pipes' numbers in the child are those of the parent, and the secret's must be none of them."""
    opened = [os.dup(0) for _ in range(24)]
    try:
        assert all(run_tests(GOOD, TESTS, 5.0).passed for _ in range(12))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def test_the_filter_lists_each_call_once_and_fits_the_machine() -> None:
    for machine, column in seccomp.MACHINES.values():
        numbers = [pair[column] for pair in seccomp.CALLS.values() if pair[column] is not None]
        assert len(numbers) == len(set(numbers))
        assert len(seccomp._program(machine, column)) % 8 == 0
        assert len(seccomp._program(machine, column)) // 8 < 4096, "the kernel takes no longer ones"


def test_misuse() -> None:
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="seconds"):
            run_tests(GOOD, TESTS, seconds)
    with pytest.raises(InputError, match="memory_mb"):
        run_tests(GOOD, TESTS, memory_mb=8)
