"""A system call filter: what no training code needs, and what would reach other processes, fails with EPERM.

Classic BPF over `struct seccomp_data`, by prctl(2) and without a library. A deny list: an allow list would
break the libraries that people train with whenever one of them learns a new call. Facts: seccomp(2), linux/seccomp.h,
linux/filter.h, and the system call tables of the two machines.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import platform
import resource
import struct
from typing import TYPE_CHECKING, Final

from scaleout_mp.sandbox.process import prctl
from scaleout_mp.sandbox.system_calls import DENIED, MACHINES, NUMBERS, Machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL_PROCESS: Final = 0x80000000

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_JUMP_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP: Final = 0x05  # BPF_JMP | BPF_JA
_RETURN: Final = 0x06  # BPF_RET | BPF_K

#: Calls that are compared one by one.
_LINEAR: Final = 3

_NR_AT: Final = 0
_ARCH_AT: Final = 4

#: CLONE_NEWTIME is left out: as a flag of clone(2) the same bit is part of the exit signal.
_NEW_NAMESPACES: Final = 0x7E020000
_X32_BIT: Final = 0x40000000


class Families(enum.Enum):
    """Which sockets can be made."""

    ALL = enum.auto()
    #: No exotic ones, such as those between a virtual machine and its host, which no namespace holds.
    NETWORK = enum.auto()
    #: Between processes of this machine only.
    LOCAL = enum.auto()


#: Calls that act on another process by number, and which argument names it. Denied for the protected processes.
_BY_PID: Final = {
    "ioprio_set": 1,
    "kill": 0,
    "pidfd_open": 0,
    "prlimit64": 0,
    "rt_sigqueueinfo": 0,
    "rt_tgsigqueueinfo": 0,
    "sched_setaffinity": 0,
    "sched_setattr": 0,
    "sched_setparam": 0,
    "sched_setscheduler": 0,
    "setpriority": 1,
    "tgkill": 0,
    "tkill": 0,
}

#: Calls that act on processes or on groups of them: which argument says on what, and which value of it means one
#: process, named by the argument after it. A task may use them on itself alone.
_BY_KIND: Final = {"ioprio_set": (0, 1), "setpriority": (0, 0)}

#: Stands in a filter for the pid of the task that will put it on; no pid is as large.
_OWN_PID: Final = 0x7FFFFFFF

#: fcntl(2): who gets the signals of a descriptor, which may be any signal.
_F_SETOWN: Final = 8
_F_SETOWN_EX: Final = 15
#: ioctl(2): the same for sockets (FIOSETOWN, SIOCSPGRP), and typing into terminals (TIOCSTI, TIOCLINUX).
_BAD_IOCTLS: Final = (0x8901, 0x8902, 0x5412, 0x541C)

#: Families of sockets that have an owner in a network namespace: unix, IPv4, IPv6, netlink.
_LOCAL_FAMILIES: Final = (1,)
_NETWORK_FAMILIES: Final = (1, 2, 10, 16)


def _instruction(code: int, operand: int, *, skip_true: int = 0, skip_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_true, skip_false, operand & 0xFFFFFFFF)


_DENY: Final = _instruction(_RETURN, _ERRNO | errno.EPERM)
_PASS: Final = _instruction(_RETURN, _ALLOW)


def _argument(index: int, *, high: bool = False) -> bytes:
    # struct seccomp_data: number, architecture, instruction pointer, then six 64-bit arguments, little-endian here.
    return _instruction(_LOAD, 16 + 8 * index + 4 * high)


def _deny_when(argument: int, jump: int, operand: int) -> list[bytes]:
    """Deny on a test of the low half of an argument: numbers of 32 bits have no other."""
    return [_argument(argument), _instruction(jump, operand, skip_false=1), _DENY]


def _allow_only(argument: int, values: Sequence[int]) -> list[bytes]:
    """Allow when the argument is one of the values."""
    last = len(values) - 1
    tests = [_instruction(_JUMP_EQUAL, value, skip_true=last - index + 1) for index, value in enumerate(values)]
    return [_argument(argument), *tests, _DENY, _PASS]


def _own(argument: int) -> list[bytes]:
    """Allow when the argument names the calling process, which can also call itself 0."""
    return _allow_only(argument, (0, _OWN_PID))


def _deny_limit_of_others() -> list[bytes]:
    """Deny a new limit for any process but the calling one; reading them is free."""
    return [
        _argument(2),
        _instruction(_JUMP_EQUAL, 0, skip_false=2),
        _argument(2, high=True),
        _instruction(_JUMP_EQUAL, 0, skip_true=4),
        _argument(0),
        _instruction(_JUMP_EQUAL, 0, skip_true=2),
        _instruction(_JUMP_EQUAL, _OWN_PID, skip_true=1),
        _DENY,
    ]


def _deny_new_limit(kind: int, pointer: int) -> list[bytes]:
    """Deny when argument `kind` is RLIMIT_RTTIME and the pointer in argument `pointer` is not null: a change of it."""
    return [
        _argument(kind),
        _instruction(_JUMP_EQUAL, resource.RLIMIT_RTTIME, skip_false=5),
        _argument(pointer),
        _instruction(_JUMP_EQUAL, 0, skip_false=2),
        _argument(pointer, high=True),
        _instruction(_JUMP_EQUAL, 0, skip_true=1),
        _DENY,
    ]


class _Program:
    """BPF instructions of one filter."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        #: What becomes of a call, by its number.
        self._bodies: dict[int, list[bytes]] = {}

    def on(self, name: str, body: Sequence[bytes]) -> None:
        """Have a call run through `body`, which ends with a return."""
        number = NUMBERS[name][self._machine.column]
        if number is not None:
            self._bodies[number] = list(body)

    def finish(self) -> bytes:
        """Return the program: what was not denied is allowed."""
        head = [
            _instruction(_LOAD, _ARCH_AT),
            _instruction(_JUMP_EQUAL, self._machine.audit_arch, skip_true=1),
            # Another architecture's calls have other numbers: nothing of ours makes them.
            _instruction(_RETURN, _KILL_PROCESS),
            _instruction(_LOAD, _NR_AT),
            # The x32 numbers of x86_64 are the same calls by other names.
            _instruction(_JUMP_AT_LEAST, _X32_BIT, skip_false=1),
            _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        ]
        return b"".join([*head, *self._search(sorted(self._bodies))])

    def _search(self, numbers: list[int]) -> list[bytes]:
        """Find a number by halving: the kernel tries the whole filter for every call there is when it is put on."""
        if len(numbers) <= _LINEAR:
            steps = [
                step
                for number in numbers
                for body in [self._bodies[number]]
                for step in [_instruction(_JUMP_EQUAL, number, skip_false=len(body)), *body]
            ]
            return [*steps, _PASS]
        middle = len(numbers) // 2
        below, above = self._search(numbers[:middle]), self._search(numbers[middle:])
        # A jump reaches 255 instructions; farther goes an unconditional one.
        return [
            _instruction(_JUMP_AT_LEAST, numbers[middle], skip_false=1),
            _instruction(_JUMP, len(below)),
            *below,
            *above,
        ]


def _program() -> _Program:
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no system call table for {platform.machine()}")
    return _Program(machine)


def build_base(protected: Iterable[int] = (), families: Families = Families.ALL) -> bytes:
    """Return the filter that is the same for every task; the template puts it on, and tasks inherit it.

    `protected` are pids that neither template nor tasks may touch: supervisor and guardian. `families` are those of
    the sockets that can be made. Raises OSError on a machine that the tables do not know.
    """
    program = _program()
    for name in DENIED:
        program.on(name, [_DENY])
    # Its flags lie in memory, which BPF cannot see. The C library falls back to clone.
    program.on("clone3", [_instruction(_RETURN, _ERRNO | errno.ENOSYS)])
    program.on("clone", [*_deny_when(0, _JUMP_ANY_BIT, _NEW_NAMESPACES), _PASS])
    for name, argument in _BY_PID.items():
        program.on(name, _deny_pids(argument, protected, everybody=name == "kill"))
    program.on("ioctl", [*(step for number in _BAD_IOCTLS for step in _deny_when(1, _JUMP_EQUAL, number)), _PASS])
    if families is not Families.ALL:
        allowed = _LOCAL_FAMILIES if families is Families.LOCAL else _NETWORK_FAMILIES
        for name in ("socket", "socketpair"):
            program.on(name, _allow_only(0, allowed))
    return program.finish()


def build_own(template: int) -> bytes:
    """Return the filter that a task puts on itself, small: the kernel compiles it at each start.

    `template` is a pid that it must not touch. Raises OSError like `build_base`.
    """
    program = _program()
    # The tag of the task's tree must stay.
    program.on("setrlimit", [*_deny_new_limit(0, 1), _PASS])
    for name, argument in _BY_PID.items():
        program.on(name, _deny_pids(argument, [template]))
    program.on("prlimit64", [*_deny_new_limit(1, 2), *_deny_limit_of_others(), _PASS])
    for name, (kind, one_process) in _BY_KIND.items():
        program.on(name, [_argument(kind), _instruction(_JUMP_EQUAL, one_process, skip_true=1), _DENY, *_own(kind + 1)])
    program.on(
        "fcntl",
        [
            *_deny_when(1, _JUMP_EQUAL, _F_SETOWN_EX),
            _instruction(_JUMP_EQUAL, _F_SETOWN, skip_true=1),
            _PASS,
            *_own(2),
        ],
    )
    return program.finish()


def for_process(own: bytes, pid: int) -> bytes:
    """Return what `build_own` returned, for the process that puts it on."""
    return own.replace(struct.pack("=I", _OWN_PID), struct.pack("=I", pid))


def _deny_pids(argument: int, protected: Iterable[int], *, everybody: bool = False) -> list[bytes]:
    """Deny when an argument names one of the processes, or its process group."""
    pids = [pid for process in protected for pid in (process, -process)]
    if everybody:
        # Whom this user may signal.
        pids.append(-1)
    if not pids:
        return [_PASS]
    last = len(pids) - 1
    return [
        _argument(argument),
        *(
            _instruction(_JUMP_EQUAL, pid, skip_true=last - place, skip_false=int(place == last))
            for place, pid in enumerate(pids)
        ),
        _DENY,
        _PASS,
    ]


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(program: bytes) -> None:
    """Put the filter on the calling process for good; descendants inherit it. Raises OSError.

    Needs no privilege in a process that was forbidden new ones.
    """
    code = ctypes.create_string_buffer(program, len(program))
    header = _SockFprog(len(program) // 8, ctypes.addressof(code))
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))
