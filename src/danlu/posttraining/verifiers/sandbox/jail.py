"""What Linux is asked for so that a process can do no harm: limits, Landlock, no capabilities, and a list of the system
calls that it may make. Everything else is refused by the kernel, whatever the process is talked into.

It runs inside the sandbox, before danlu can be imported, so it knows Python's standard library alone. Each layer is
taken where the kernel grants it; what holds in the end is found by trying (``zygote.py``), not by believing.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence
from typing import Any

SCRATCH_BYTES = 16 * 2**20
SCRATCH_FILES = 1024
MAX_OPEN_FILES = 64

# Name, number on x86-64, number on arm64 (asm/unistd_64.h, asm-generic/unistd.h). What Python needs to compute, to read
# its library, to use threads and event loops; the socket calls are for the pair through which a loop wakes itself. Not
# among them: other processes and programs, signals, sockets that lead anywhere, rights, owners and times of files,
# mounts, other limits, io_uring.
CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, close 3 57, fstat 5 80,
newfstatat 262 79, stat 4 -, lstat 6 -, statx 332 291, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
mremap 25 216, brk 12 214, madvise 28 233, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
sigaltstack 131 132, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, pipe 22 -, pipe2 293 59, dup 32 23, dup2 33 -, dup3 292 24,
access 21 -, faccessat 269 48, faccessat2 439 439, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50,
readlink 89 -, readlinkat 267 78, mkdir 83 -, mkdirat 258 34, unlink 87 -, unlinkat 263 35, rmdir 84 -, rename 82 -,
renameat 264 38, renameat2 316 276, ftruncate 77 46, fsync 74 82, fdatasync 75 83, flock 73 32, umask 95 166,
getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getpgrp 111 -, getpgid 121 155, getsid 124 156, uname 63 160, sysinfo 99 179, times 100 153, getrusage 98 165,
gettimeofday 96 169, time 201 -, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
nanosleep 35 101, setitimer 38 103, getitimer 36 102, alarm 37 -, pause 34 -, futex 202 98, set_robust_list 273 99,
get_robust_list 274 100, rseq 334 293, set_tid_address 218 96, sched_yield 24 124, sched_getaffinity 204 123,
getrandom 318 278, exit 60 93, exit_group 231 94, arch_prctl 158 -, restart_syscall 219 128, membarrier 324 283,
socketpair 53 199, getsockname 51 204, getsockopt 55 209, recvfrom 45 207, shutdown 48 210
"""
OPENAT, FCNTL, IOCTL, SENDTO, CLONE, CLONE3 = (257, 56), (72, 25), (16, 29), (44, 206), (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: the column of the numbers above, and AUDIT_ARCH (linux/audit.h)."""

FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no signals
IOCTL_COMMANDS = (0x5401, 0x5421, 0x5450, 0x5451)  # TCGETS (is it a terminal?), FIONBIO, FIONCLEX, FIOCLEX
CLONE_THREAD = 0x10000
EPERM, ENOSYS = 1, 38

# linux/prctl.h, linux/capability.h, sys/mount.h, linux/sched.h
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 16384, 1 << 18, 2
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000

# linux/landlock.h; the three system calls have these numbers on every machine.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR, EXECUTE, REFER, IOCTL_DEV = 1 << 2, 1 << 3, 1 << 0, 1 << 13, 1 << 15
OF_FILES = EXECUTE | 1 << 1 | READ_FILE | 1 << 14 | IOCTL_DEV  # and write, truncate: what can be allowed for one file
MAKE_NODES = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # devices, sockets, pipes
RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}


def leave_namespaces() -> bool:
    """Leave the network, the mounts and the shared memory of the machine for empty ones of our own; True where that is
    permitted. Files look the same afterwards: they are Landlock's."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        return False
    try:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    except OSError:
        return False
    return libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0  # type: ignore[no-any-return]


def fresh_scratch(folder: str, *, mounted: bool) -> bool:
    """Lay an empty folder in memory over ``folder``, in place of the last one, seen by this process and its children
    only; True where that is permitted. What fills it up meets its end at :data:`SCRATCH_BYTES`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if mounted and libc.umount2(folder.encode(), MNT_DETACH) != 0:
        return False
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700".encode()
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options) == 0  # type: ignore[no-any-return]


def confine(*, seconds: float, memory_bytes: int, readable: Sequence[str], scratch: str | None) -> None:
    """Give up, in this process and for good, all that judging code does not need.

    Args:
        seconds: of processor time, in whole ones; afterwards the kernel kills it.
        memory_bytes: of addresses, its own 60 MB or so among them.
        readable: folders and files that stay readable.
        scratch: the folder that can be written; None: none can.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    _limit(resource.RLIMIT_CPU, math.ceil(seconds), math.ceil(seconds) + 1)
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, SCRATCH_BYTES)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _restrict_files(libc, readable, scratch)
    libc.capset(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    _restrict_calls(libc)


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    _, most = resource.getrlimit(which)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(soft if hard is None else hard, most)
    resource.setrlimit(which, (soft, soft if hard is None else hard))


def _restrict_files(libc: Any, readable: Iterable[str], scratch: str | None) -> None:
    """Landlock: nothing is opened or listed but what is allowed here."""
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    rights = RIGHTS_OF_ABI[max(version for version in RIGHTS_OF_ABI if version <= abi)]
    # From ABI 4 on TCP, from 6 on signals and abstract sockets can be refused, too.
    attributes = struct.pack("=QQQ", rights, 3, 3)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return
    allowed = [(path, READ_FILE | READ_DIR) for path in readable]
    if scratch is not None:
        allowed.append((scratch, rights & ~(EXECUTE | MAKE_NODES | IOCTL_DEV)))
    for path, wanted in allowed:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            wanted &= OF_FILES
        libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", wanted, place), 0)
        os.close(place)
    libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _restrict_calls(libc: Any) -> None:
    """seccomp: what is not allowed fails with EPERM."""
    if platform.machine() not in MACHINES:
        return
    program = filter_program(platform.machine())
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


def filter_program(machine: str) -> bytes:
    """The filter in classic BPF (seccomp(2)): 8 bytes an instruction."""
    column, architecture = MACHINES[machine]
    load, equal, any_bit, at_least, mask, give = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
    allow, kill, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x80000000), (give, 0, 0, 0x50000 | EPERM)

    def argument(index: int, high: bool = False) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * index + 4 * high  # both machines are little-endian

    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        kill,
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the x32 calls of x86-64
        kill,
    ]

    def rule(call: tuple[int, int], *then: tuple[int, int, int, int]) -> None:
        code.extend([(equal, 0, len(then), call[column]), *then])

    for line in CALLS.split(","):
        if (number := line.split()[1 + column]) != "-":
            code.extend([(equal, 0, 1, int(number)), allow])
    # A thread shares everything with its process and ends with it; its flags can be read with clone, not with clone3,
    # without which the C library takes clone.
    rule(CLONE3, (give, 0, 0, 0x50000 | ENOSYS))
    rule(CLONE, argument(0), (any_bit, 0, 1, CLONE_THREAD), allow, refuse)
    # Older Landlock lets a file that is only opened for reading be emptied.
    rule(
        OPENAT,
        argument(2),
        (mask, 0, 0, os.O_TRUNC | os.O_ACCMODE),
        (equal, 0, 1, os.O_TRUNC | os.O_RDONLY),
        refuse,
        allow,
    )
    for call, commands in ((FCNTL, FCNTL_COMMANDS), (IOCTL, IOCTL_COMMANDS)):
        steps = [step for command in commands for step in ((equal, 0, 1, command), allow)]
        rule(call, argument(1), *steps, refuse)
    # Without an address it goes to the other end of the pair.
    rule(SENDTO, argument(4), (equal, 0, 3, 0), argument(4, high=True), (equal, 0, 1, 0), allow, refuse)
    code.append(refuse)
    return b"".join(struct.pack("=HBBI", operation, yes, no, k) for operation, yes, no, k in code)
