"""A filter for Linux's kernel that lets a Python program calculate and read files, and nothing else.

Written as a program of the kernel's packet-filter machine (`man 2 seccomp`). It lists what is allowed, so that a
system call which nobody thought of, or which does not exist yet, is refused with EPERM too. Processes, threads,
signals to others, sockets, and every way of creating, changing or deleting a file are not on the list.
"""

from __future__ import annotations

import platform
import struct
import sys

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""What the kernel is to do with a call: run it, answer EPERM, or end the process."""

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""For each machine its AUDIT_ARCH number, and its column below."""

CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79),
    "stat": (4, None), "lstat": (6, None), "statx": (332, 291), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "sched_yield": (24, 124), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "getitimer": (36, 102),
    "setitimer": (38, 103), "alarm": (37, None), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "uname": (63, 160), "getcwd": (79, 17), "getdents64": (217, 61),
    "readlink": (89, None), "readlinkat": (267, 78), "gettimeofday": (96, 169), "time": (201, None),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "exit": (60, 93), "exit_group": (231, 94), "set_robust_list": (273, 99),
    "rseq": (334, 293), "getrandom": (318, 278), "statfs": (137, 43), "fstatfs": (138, 44),
    "restart_syscall": (219, 128), "membarrier": (324, 283),
}  # fmt: skip
"""System calls that are always allowed, with their numbers on x86-64 and on ARM64 (None where there is none)."""

OPEN = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
"""Opening, with the argument that holds the flags: allowed for reading only."""

WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and O_APPEND, which are the same on both machines."""

CONTROL = {
    "ioctl": ((16, 29), (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)),
    "fcntl": ((72, 25), (0, 1, 2, 3, 1030)),
}
"""Calls allowed for some commands only: is this a terminal, how wide, how much is there to read, inheritance."""

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
"""Where `struct seccomp_data` has the call's number, the machine, and the arguments of eight bytes each."""


def filter_program() -> bytes:
    """The filter for this machine, as an array of `struct sock_filter`; empty where there is none."""
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return b""
    machine, column = MACHINES[platform.machine()]
    return _program(machine, column)


def _program(machine: int, column: int) -> bytes:
    code = [_op(LOAD, MACHINE), _op(EQUAL, machine, 1, 0), _op(RETURN, KILL), _op(LOAD, NUMBER)]
    for numbers in CALLS.values():
        code += _if_equal(numbers[column], [_op(RETURN, ALLOW)])
    for numbers, argument in OPEN.values():
        reading = [_op(EQUAL, 0, 0, 1), _op(RETURN, ALLOW), _op(RETURN, REFUSE)]
        code += _if_equal(numbers[column], [_op(LOAD, ARGUMENTS + 8 * argument), _op(AND, WRITING), *reading])
    for numbers, commands in CONTROL.values():
        body = [_op(LOAD, ARGUMENTS + 8)]
        for command in commands:
            body += _if_equal(command, [_op(RETURN, ALLOW)])
        code += _if_equal(numbers[column], [*body, _op(RETURN, REFUSE)])
    return b"".join([*code, _op(RETURN, REFUSE)])


def _if_equal(value: int | None, body: list[bytes]) -> list[bytes]:
    """`body` for calls whose loaded word is `value`; a call that this machine lacks needs none."""
    return [] if value is None else [_op(EQUAL, value, 0, len(body)), *body]


def _op(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)
