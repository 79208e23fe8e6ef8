"""Sandbox: run Python code that nobody has read, such as a model's, against tests, so that nothing escapes.

    outcome = run_tests("def double(x):\\n    return 2 * x", "assert double(4) == 8", seconds=2.0)
    outcome.kind        # "passed"

The code runs in an isolated interpreter of its own, in an empty folder, with limits on time, memory and output. It
can calculate, import the standard library and read the standard library's files. It cannot start a process or a
thread, write or delete a file, or use the network: on Linux (x86-64, ARM64) the kernel refuses it by
`core.seccomp`, and everywhere Python's audit hook ends the run at the attempt and says what it was. Where the
kernel does not help, `Outcome.kernel` is False, and code written to break out of Python could.

Tests are statements such as `assert f(1) == 2`, run in the namespace of the code. They are no defence against code
that is written to deceive them: it can return objects that are equal to everything, or walk up the frames to where
the word is kept that says "passed". It can lie about itself; it cannot get out.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenworks.core.errors import InputError, TokenworksError
from tokenworks.core.seccomp import filter_program

Kind = Literal["passed", "failed", "error", "timeout", "memory", "output", "forbidden"]

OUTPUT_LIMIT = 1 << 16
"""Bytes that the code may print."""

START_SECONDS = 30.0
"""For the interpreter to start, before the code's own time begins."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        kind: "passed"; "failed" (a test's assertion); "error" (any other exception, an early exit, a crash);
            "timeout", "memory" and "output" (beyond a limit); "forbidden" (it tried what it may not do).
        message: one sentence for a user; empty if passed.
        output: what the code printed, at most `OUTPUT_LIMIT` bytes.
        seconds: that the code and its tests took.
        kernel: whether the kernel enforced the refusals, not only Python.
    """

    kind: Kind
    message: str
    output: str
    seconds: float
    kernel: bool

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


def run_tests(code: str, tests: str, seconds: float = 2.0, memory_mb: int = 256) -> Outcome:
    """Run `code`, then `tests` in its namespace.

    Args:
        code: defines what the tests call. Its module is named "solution", so a `__main__` part does not run.
        tests: any statements; if the last one is reached and raises nothing, the code has passed.
        seconds: wall time for both, above 0.
        memory_mb: address space of the whole interpreter, at least 64.

    Raises:
        InputError: a number out of range, or the system is not POSIX.
        TokenworksError: the interpreter did not start.
    """
    if os.name != "posix":
        raise InputError("code: it cannot be run safely here; Linux or macOS is needed")
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds: {seconds} is not a number above 0")
    if memory_mb < 64:
        raise InputError(f"memory_mb: {memory_mb} is below 64, which the interpreter itself may need")
    secret = secrets.token_hex(16)
    request = json.dumps(
        {
            "code": code,
            "tests": tests,
            "memory": memory_mb << 20,
            "cpu": int(seconds) + 2,
            "filter": filter_program().hex(),
        }
    ).encode()
    with tempfile.TemporaryDirectory(prefix="tokenworks-") as folder:
        run = _Run(folder, f"{len(request):08x}".encode() + request + secret.encode())
        try:
            return run.outcome(seconds, secret)
        finally:
            run.end()


class _Run:
    """One child process, the pipes to it, and what has come out of them."""

    def __init__(self, folder: str, request: bytes) -> None:
        read, write = os.pipe()
        child = Path(__file__).with_name("sandbox_child.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", str(child), str(write)],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                start_new_session=True,
            )
        except OSError as error:
            os.close(read)
            raise TokenworksError(f"sandbox: no interpreter could be started ({error})") from error
        finally:
            os.close(write)
        self._report, self._said, self._printed = read, b"", b""
        stdin: Any = self._process.stdin
        with suppress(BrokenPipeError):
            stdin.write(request)
            stdin.flush()

    def outcome(self, seconds: float, secret: str) -> Outcome:
        """Wait until the child has said what came of it, has ended, or has used up its time."""
        stdout: Any = self._process.stdout
        deadline, begun = time.monotonic() + START_SECONDS, None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._report, selectors.EVENT_READ)
            waiting.register(stdout.fileno(), selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 14)
                    if not piece:
                        waiting.unregister(key.fd)
                    elif key.fd == self._report:
                        self._said += piece
                    else:
                        self._printed += piece
                if begun is None and b"\n" in self._said:
                    begun = time.monotonic()
                    deadline = begun + seconds
                if len(self._printed) > OUTPUT_LIMIT:
                    return self._found("output", f"it printed more than {OUTPUT_LIMIT} bytes", begun)
                told = self._told(secret, begun)
                if told is not None:
                    return told
                if not ready and time.monotonic() >= deadline:
                    break
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        return self._silent(begun, seconds)

    def _told(self, secret: str, begun: float | None) -> Outcome | None:
        """What the child's last whole line says, once it says more than that it is ready."""
        lines = self._said.decode("utf-8", "replace").split("\n")[1:-1]
        for kind, _, message in (line.partition("\x1f") for line in lines):
            if kind == "passed" and secrets.compare_digest(message.encode(), secret.encode()):
                return self._found("passed", "", begun)
            if kind in ("failed", "error", "memory", "forbidden"):
                return self._found(kind, message, begun)  # type: ignore[arg-type]
        return None

    def _silent(self, begun: float | None, seconds: float) -> Outcome:
        """The outcome of a child that did not say."""
        code = self._process.poll()
        if begun is None:
            printed = self._printed.decode("utf-8", "replace").strip()
            raise TokenworksError(f"sandbox: the interpreter did not start ({printed or code})")
        if code is None or code == -signal.SIGXCPU:
            return self._found("timeout", f"it ran for more than {seconds:g} s", begun)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self._found("error", f"the process ended before its tests were through ({how})", begun)

    def _found(self, kind: Kind, message: str, begun: float | None) -> Outcome:
        stdout: Any = self._process.stdout
        os.set_blocking(stdout.fileno(), False)
        with suppress(BlockingIOError):  # what it printed just before
            while len(self._printed) <= OUTPUT_LIMIT and (piece := os.read(stdout.fileno(), 1 << 14)):
                self._printed += piece
        output = self._printed[:OUTPUT_LIMIT].decode("utf-8", "replace")
        taken = 0.0 if begun is None else time.monotonic() - begun
        return Outcome(kind, message, output, taken, self._said.startswith(b"ready\x1ffilter\n"))

    def end(self) -> None:
        """Kill the child and whatever it may have started; close the pipes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        os.close(self._report)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
