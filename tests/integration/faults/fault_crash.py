"""Crash and exit: every way in which a process can end without, before or after its result."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import mmap
import os
import platform
import resource
import signal
import sys
import threading
import time

from fault_catalogue import fault

from scaleout_mp import EndReason, Limits

CRASHED, FAILED, COMPLETED = EndReason.CRASHED, EndReason.FAILED, EndReason.COMPLETED


@fault(CRASHED, signal="SIGSEGV", trace="in segfault")
def segfault(_):
    ctypes.string_at(0)


@fault(CRASHED, signal="SIGSEGV")
def segfault_without_a_traceback(_):
    faulthandler.disable()
    ctypes.string_at(0)


@fault(CRASHED, signal="SIGABRT", trace="in abort")
def abort(_):
    os.abort()


@fault(CRASHED, signal="SIGILL", trace="in illegal_instruction")
def illegal_instruction(_):
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\x0b" if platform.machine() == "x86_64" else b"\0\0\0\0")
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    ctypes.CFUNCTYPE(None)(address)()


@fault(CRASHED, signal="SIGBUS", trace="in bus_error")
def bus_error(place):
    descriptor = os.open(f"{place.folder}/mapped", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    mapped = mmap.mmap(descriptor, mmap.PAGESIZE)
    os.ftruncate(descriptor, 0)
    return mapped[0]


@fault(CRASHED, signal="SIGFPE")
def arithmetic_error(_):
    signal.raise_signal(signal.SIGFPE)


@fault(CRASHED, signal="SIGKILL", says="not sent from here")
def killed_by_itself(_):
    os.kill(os.getpid(), signal.SIGKILL)


@fault(CRASHED, signal="signal 40")
def real_time_signal(_):
    os.kill(os.getpid(), 40)


@fault(CRASHED, says="code 0 before it returned a result")
def exit_zero(_):
    os._exit(0)


@fault(CRASHED, says="code 255")
def exit_with_a_code(_):
    os._exit(-1)


@fault(CRASHED, says="code 0 before it returned a result")
def exit_from_a_thread(_):
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(1_000)


@fault(CRASHED, says="code 0 before it returned a result")
def become_another_program(_):
    os.execv("/bin/true", ["true"])


@fault(FAILED, error="SystemExit")
def system_exit(_):
    sys.exit(0)


@fault(FAILED, error="KeyboardInterrupt")
def keyboard_interrupt(_):
    raise KeyboardInterrupt


@fault(CRASHED, signal="SIGINT")
def interrupt_signal(_):
    signal.raise_signal(signal.SIGINT)


class _Everything(BaseException):
    pass


@fault(FAILED, error="_Everything", says="out of everything")
def base_exception(_):
    raise _Everything("out of everything")


@fault(FAILED, error="GeneratorExit")
def generator_exit(_):
    raise GeneratorExit


class _Mute(Exception):
    def __str__(self):
        raise self

    __repr__ = __str__


@fault(FAILED, error="_Mute", says="cannot be shown")
def hostile_message(_):
    raise _Mute


class _Quitter(Exception):
    def __str__(self):
        return sys.exit(0)

    __repr__ = __str__


@fault(FAILED, error="_Quitter", says="cannot be shown")
def message_that_exits(_):
    raise _Quitter


class _NoText(str):
    __slots__ = ()

    def encode(self, *_):
        return self

    def decode(self, *_):
        return 5


class _Riddle(Exception):
    def __str__(self):
        return _NoText("riddle")


@fault(FAILED, error="_Riddle", says="riddle")
def message_that_is_no_text(_):
    raise _Riddle


class _Nameless(type):
    @property
    def __name__(cls):
        raise AttributeError("no name")


class _Unnamed(Exception, metaclass=_Nameless):
    pass


@fault(FAILED, error="_Unnamed", says="who raised this")
def class_without_a_name(_):
    raise _Unnamed("who raised this")


class _NoNumber(OSError):
    @property
    def errno(self):
        raise SystemExit

    def __str__(self):
        return "no number"


@fault(FAILED, error="_NoNumber", says="no number")
def error_number_that_exits(_):
    raise _NoNumber


@fault(FAILED, error="ValueError", says="xxxx", trace="in message_of_200_megabytes")
def message_of_200_megabytes(_):
    raise ValueError("x" * 200_000_000)


@fault(FAILED, error="KeyError")
def cyclic_causes(_):
    first, second = KeyError("first"), IndexError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


@fault(FAILED, error="ValueError", says="the last of them")
def ten_thousand_causes(_):
    error = ValueError("the first of them")
    for _ in range(10_000):
        error, error.__context__ = ValueError("the last of them"), error
    raise error


def _nested_groups(depth):
    group = ValueError("innermost")
    for _ in range(depth):
        group = ExceptionGroup("group", [group])
    return group


@fault(FAILED, error="ExceptionGroup", says="group")
def exception_groups_in_groups(_):
    raise _nested_groups(900)


@fault(FAILED, error="RecursionError", trace="in endless_recursion")
def endless_recursion(place):
    endless_recursion(place)


class _Endless:
    def __repr__(self):
        return repr(self)


# Since 3.12 the interpreter bounds its recursion in C by itself.
@fault(CRASHED if sys.version_info < (3, 12) else FAILED)
def stack_overflow(_):
    sys.setrecursionlimit(1 << 30)
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
    repr(_Endless())


@fault(COMPLETED, returns="safe", note="ended with SIGSEGV after the result was in")
def crash_after_the_result(_):
    atexit.register(ctypes.string_at, 0)
    return "safe"


@fault(COMPLETED, returns="safe", note="ended with exit code 7 after the result was in")
def exit_code_after_the_result(_):
    atexit.register(os._exit, 7)
    return "safe"


@fault(COMPLETED, returns="safe")
def exit_handler_that_raises(_):
    atexit.register(sys.exit, 9)
    return "safe"


@fault(COMPLETED, returns="safe", note="ended with SIGKILL after the result was in")
def exit_handler_that_hangs(_):
    atexit.register(time.sleep, 1_000)
    return "safe"


@fault(COMPLETED, returns="safe", note="ended with SIGKILL after the result was in")
def thread_that_never_ends(_):
    threading.Thread(target=time.sleep, args=(1_000,)).start()
    return "safe"


@fault(COMPLETED, returns="safe")
def daemon_thread_that_spins(_):
    def spin():
        while True:
            pass

    threading.Thread(target=spin, daemon=True).start()
    return "safe"


@fault(FAILED, error="ValueError", says="before the handler")
def failure_and_an_exit_handler_that_hangs(_):
    atexit.register(time.sleep, 1_000)
    raise ValueError("before the handler")


@fault(COMPLETED, returns="safe")
def closed_standard_streams(_):
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    return "safe"


@fault(EndReason.CPU_TIME, limits=Limits(cpu_time=0.3, abort_grace=0.3))
def endless_work(_):
    while True:
        sum(range(100_000))


@fault(EndReason.OPEN_FILES, limits=Limits(open_files=64, abort_grace=0.3))
def too_many_files(_):
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
