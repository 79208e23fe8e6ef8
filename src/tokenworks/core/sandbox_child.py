"""What `core.sandbox` starts in a process of its own: shuts every door, then runs the code and its tests.

Run as a script by an isolated interpreter that knows nothing of tokenworks. It says on a pipe what came of it, one
line of "kind, unit separator, message" at a time. "passed" must be followed by a secret that stays unread in
another pipe until the last test has passed, so that code cannot say it by itself without going looking for it.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

SECRET = 32
"""Bytes of the secret."""

HARMLESS = frozenset((
    "exec", "compile", "code.__new__", "function.__new__", "object.__getattr__", "object.__setattr__",
    "object.__delattr__", "marshal.loads", "marshal.load", "marshal.dumps", "pickle.find_class",
    "array.__new__", "time.sleep", "builtins.id", "builtins.input", "builtins.input/result", "sys._getframe",
    "sys._getframemodulename", "sys.excepthook", "sys.unraisablehook", "sys.set_asyncgen_hooks_firstiter",
    "sys.set_asyncgen_hooks_finalizer", "os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv",
    "os.unsetenv", "glob.glob", "glob.glob/2", "_thread._excepthook",
))  # fmt: skip
"""Audit events that mean nothing bad. Whatever is not here, nor handled in `guard`, ends the run."""

STARTS = (
    ("os.fork", "start another process"), ("os.posix_spawn", "start another process"),
    ("os.spawn", "start another process"), ("os.exec", "start another process"),
    ("os.system", "start another process"), ("subprocess.", "start another process"),
    ("pty.", "start another process"), ("_thread.", "start a thread"), ("socket.", "use the network"),
    ("urllib.", "use the network"), ("http.", "use the network"), ("ctypes.", "call native code"),
    ("gc.", "look into the interpreter"), ("sys.", "look into the interpreter"), ("os.kill", "send a signal"),
    ("shutil.", "change files"), ("tempfile.", "change files"), ("os.", "change files or the system"),
)  # fmt: skip
"""What an event means, by how its name starts; the first that fits."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(report: int) -> None:
    size = int(_read(0, 8), 16)
    request = json.loads(_read(0, size))
    # Away from standard input, where `input()` would find the secret, to a number that is not always the same.
    place = 16 + os.urandom(1)[0] % 32
    secret = os.dup2(0, place + (place == report), inheritable=False)
    silence = os.open(os.devnull, os.O_RDONLY)
    os.dup2(silence, 0)
    os.close(silence)

    # What is needed later is bound now: the code may change any module, and must not find this one.
    write, leave, take, tell = os.write, os._exit, os.read, describe
    run, translate, size = exec, compile, SECRET
    sys.modules["__main__"] = types.ModuleType("__main__")

    def say(kind: str, message: str) -> None:
        write(report, f"{kind}\x1f{message[:500]}\n".encode("utf-8", "replace"))

    kept = builtins.__dict__.copy()
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    limit(request["memory"], request["cpu"])
    filtered = install(bytes.fromhex(request["filter"]))
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]
    sys.addaudithook(guard(say, leave, tuple(f"{path}/" for path in [*sys.path, "/usr/share/zoneinfo"])))
    say("ready", "filter" if filtered else "")
    try:
        run(translate(request["code"], "<code>", "exec"), module.__dict__)
        # Tests are to mean what they say, whatever the code has put in the place of `all` or `len`.
        builtins.__dict__.clear()
        builtins.__dict__.update(kept)
        module.__dict__["__builtins__"] = builtins
        run(translate(request["tests"], "<tests>", "exec"), module.__dict__)
    except BaseException as error:
        say(*tell(error, request["tests"].splitlines()))
        leave(1)
    write(report, b"passed\x1f" + take(secret, size) + b"\n")
    leave(0)


def _read(source: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = os.read(source, size - len(found))
        if not piece:
            os._exit(3)
        found += piece
    return found


def limit(memory: int, cpu: int) -> None:
    """Limits of the system itself: bytes of memory, seconds of CPU, no files, few descriptors, no processes."""
    import resource

    limits = {"AS": memory, "CPU": cpu, "FSIZE": 0, "NOFILE": 64, "NPROC": 0, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            try:
                resource.setrlimit(kind, (value, value))
            except (ValueError, OSError):  # macOS knows RLIMIT_AS and refuses it
                continue


def install(program: bytes) -> bool:
    """Hand the kernel its filter; False where there is none or the kernel takes none."""
    if not program:
        return False
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4]
    found = Program(len(program) // 8, program)
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    if prctl(no_new_privileges, 1, 0, 0, 0):
        return False
    return not prctl(set_seccomp, by_filter, ctypes.addressof(found), 0, 0)


def guard(
    say: Callable[[str, str], None], leave: Callable[[int], Any], roots: tuple[str, ...]
) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that ends the run at the first event that is not harmless.

    It ends it rather than raising, which code could catch to go on trying. It uses nothing that code can replace.
    """
    harmless, starts, writing, text, number, binary = HARMLESS, STARTS, WRITING, str, int, bytes
    kind_of, native = type, ("ctypes", "_ctypes")

    def refuse(what: str) -> None:
        say("forbidden", f"the code tried to {what}, which is not allowed")
        leave(1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in harmless:
            return
        if event == "import":
            if args[0] in native:
                refuse(f"call native code ({args[0]})")
            return
        if event == "open":
            path, _, flags = args
            if kind_of(path) is number:
                return
            if kind_of(path) is binary:
                path = path.decode("utf-8", "replace")
            if kind_of(path) is not text or flags & writing:
                refuse(f"write to the file {path!r}" if kind_of(path) is text else "open a file")
            elif ".." in path or (path.startswith("/") and not path.startswith(roots)):
                refuse(f"read the file {path!r}")
            return
        for start, meaning in starts:
            if event.startswith(start):
                return refuse(f"{meaning} ({event})")
        refuse(f"call {event}")

    return hook


def describe(error: BaseException, tests: list[str]) -> tuple[str, str]:
    """Kind and message of what stopped the run."""
    try:
        text = f"{type(error).__name__}: {error}".replace("\n", " ").removesuffix(": ")
    except BaseException:  # the code's own exception, whose text fails
        text = type(error).__name__
    place, trace = "", error.__traceback__
    while trace is not None:
        name, number = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if name == "<tests>" and 0 < number <= len(tests):
            place = f" in the test: {tests[number - 1].strip()}"
        elif name == "<code>" and not place:
            place = f" in line {number} of the code"
        trace = trace.tb_next
    if isinstance(error, MemoryError):
        return "memory", f"it needed more memory than it may have{place}"
    # Threads, which not every version of Python tells the audit hook about.
    if isinstance(error, PermissionError) or text == "RuntimeError: can't start new thread":
        return "forbidden", f"the code tried something that is not allowed ({text}){place}"
    if isinstance(error, AssertionError):
        return "failed", text + place
    if isinstance(error, SystemExit):
        return "error", f"it ended itself before its tests were through ({text}){place}"
    return "error", text + place


if __name__ == "__main__":
    main(int(sys.argv[1]))
