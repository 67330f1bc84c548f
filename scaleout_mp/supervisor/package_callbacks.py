"""The callbacks of a compute package, which is loaded in the template and never here."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any, Final, Protocol

from scaleout_mp.client.package_calls import DESCRIBE, PackageOrder
from scaleout_mp.errors import LauncherError, PackageError
from scaleout_mp.executor import Interpreter, PreparedCallable
from scaleout_mp.ipc.messages import CANNOT_LOAD
from scaleout_mp.supervisor.callbacks import CALLBACK_WORKER, Callbacks, callback_worker, missing
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.config import Limits
    from scaleout_mp.executor import Environment, ExecutorCore, WorkerSpec
    from scaleout_mp.executor.worker_handle import Isolation
    from scaleout_mp.task import ExitReport, Record

logger = logging.getLogger(__name__)

#: Seconds between two looks at the files of a package that waits for its next task. There is no descriptor that tells
#: of changes in a tree of folders, on every file system.
LOOK_EVERY: Final = 2.0
#: Seconds that a package gets for its imports and its `startup(client)`.
STARTUP_SECONDS: Final = 300.0
#: Seconds until a package that could not be made ready is tried again though it has not changed.
_TRY_AGAIN: Final = 60.0
#: Task types, and characters of a name, that are read off a package.
_MAX_TYPES: Final = 1000
_MAX_NAME: Final = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadablePackage:
    """A package that is ready to be loaded."""

    #: The folder with `scaleout.yaml` in it.
    folder: str
    #: File with `startup(client)` in it, below `folder`.
    startup: str
    #: The Python of its own environment; None: that of the program.
    environment: Environment | None = None


class PackageSource(Protocol):
    """Where a package comes from. `version` and `make_ready` block; they are called on a thread, one at a time."""

    @property
    def name(self) -> str:
        """The package's name, for people."""
        ...

    def version(self) -> str:
        """Return what changes whenever the package does. Quick; raises PackageError and OSError."""
        ...

    def make_ready(self) -> LoadablePackage:
        """Do what is needed before it can be loaded; may take long. Raises PackageError and OSError."""
        ...

    def close(self) -> None:
        """Break off what `make_ready` is at. Called from another thread, and returns at once."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    """One version of the package, as it is in the template; or why it is not."""

    version: str
    call: PreparedCallable | None = None
    #: Name of the callback of each task type.
    task_types: dict[str, str] = dataclasses.field(default_factory=dict)
    problem: str = ""
    #: Time on the loop's clock at which it is worth another try; None: when the files have changed.
    try_again: float | None = None


class PackageCallbacks(Callbacks):
    """Loads the package once for each version of its files; all its callbacks are one callable."""

    def __init__(
        self,
        source: PackageSource,
        core: ExecutorCore,
        *,
        client: tuple[str, str],
        isolation: Isolation,
        limits: Limits,
        on_record: Callable[[Record], None],
        on_problem: Callable[[str], None],
        startup_seconds: float | None = None,
    ) -> None:
        """`client` is its name and id. `on_record` gets what `startup` logs, `on_problem` why a version is unusable."""
        self._source = source
        self._core = core
        self._client = client
        self._in_worker = isolation == "worker"
        # Of the limits of its tasks, those that a task of another kind passes have to be its own.
        self._limits = dataclasses.replace(
            limits, wall_time=startup_seconds or STARTUP_SECONDS, no_progress=None, cpu_time=None
        )
        self._on_record = on_record
        self._on_problem = on_problem
        self._loaded: _Loaded | None = None
        self._loads = 0
        #: One at a time looks, loads and switches.
        self._turn = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._loading: set[asyncio.Task[_Loaded]] = set()

    async def open(self) -> None:
        """Begin to load the package; tasks that come meanwhile wait for it."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="package")

    async def aclose(self) -> None:
        """Stop looking at the package. The executor ends what of it runs."""
        self._source.close()
        tasks = [*self._loading, *filter(None, [self._watching])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            try:
                await self._current()
            except Exception:
                # Whatever is wrong here, the next look may find the package as it should be.
                logger.exception("the package could not be looked at", extra={"action": "package_look_failed"})
            await asyncio.sleep(LOOK_EVERY)

    # What jobs ask for

    async def worker(self, task_type: str) -> WorkerSpec | None:
        """Return the worker that runs this version of the package; None: a fresh process runs each task.

        Raises as `prepared`.
        """
        if not self._in_worker:
            return None
        return callback_worker(await self.prepared(task_type))

    async def prepared(self, task_type: str) -> PreparedCallable:
        """Return what runs tasks of every type, of the package as it is now.

        Raises PackageError when it cannot be loaded, ConfigError when it has no callback for `task_type`.
        """
        loaded = await self._current()
        if loaded.call is None:
            raise PackageError(loaded.problem)
        if task_type not in loaded.task_types:
            raise missing(task_type)
        return loaded.call

    def leading(self, task_type: str) -> tuple[Any, ...]:
        """Return the arguments that what is `prepared` takes before those of the task."""
        return (str(task_type),)

    def name(self, task_type: str) -> str:
        """Return a task's name for people: its type and what runs."""
        names = {} if self._loaded is None else self._loaded.task_types
        return f"{task_type} ({names.get(task_type, self._source.name)})"

    # Loading

    async def _current(self) -> _Loaded:
        """Return the package as its files are now, loaded if they have changed."""
        # A job that is aborted while it waits must not take the loading with it: others wait for the same.
        task = asyncio.get_running_loop().create_task(self._look())
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        return await asyncio.shield(task)

    async def _look(self) -> _Loaded:
        async with self._turn:
            unreadable: Exception | None = None
            try:
                version = await asyncio.to_thread(self._source.version)
            except (PackageError, OSError) as error:
                version, unreadable = f"unreadable: {error}", error
            known = self._loaded
            if known is not None and known.version == version and not self._is_due(known):
                return known
            self._loaded = await self._load(version) if unreadable is None else self._broken(version, unreadable)
            if known is None or known.problem != self._loaded.problem or not known.problem:
                self._say(self._loaded)
            return self._loaded

    @staticmethod
    def _is_due(loaded: _Loaded) -> bool:
        return loaded.try_again is not None and loaded.try_again <= asyncio.get_running_loop().time()

    async def _load(self, version: str) -> _Loaded:
        logger.info("package %s: loading", self._source.name, extra={"action": "package_loading"})
        try:
            ready = await asyncio.to_thread(self._source.make_ready)
        except (PackageError, OSError) as error:
            # Whatever it lacks need not be among its files: a server that does not answer, a full disk.
            again = asyncio.get_running_loop().time() + _TRY_AGAIN
            return self._broken(version, error, try_again=again)
        try:
            self._core.retire_worker(CALLBACK_WORKER)
            await self._core.renew(Interpreter(environment=ready.environment, modules=_module_folders(ready)))
            self._loads += 1
            call = self._call(ready, version)
            task_types = await self._ask(call)
        except (PackageError, LauncherError) as error:
            return self._broken(version, error)
        return _Loaded(version=version, call=call, task_types=task_types)

    def _broken(self, version: str, error: Exception, *, try_again: float | None = None) -> _Loaded:
        problem = f"package {self._source.name} cannot be used, until its files change: {error}"
        return _Loaded(version=version, problem=problem, try_again=try_again)

    def _call(self, ready: LoadablePackage, version: str) -> PreparedCallable:
        name, client_id = self._client
        order = PackageOrder(
            folder=ready.folder,
            startup=ready.startup,
            # The same files again, after others, are another template's.
            version=f"{self._loads} {version}",
            client_name=name,
            client_id=client_id,
        )
        key, pickled = order.pickled()
        return PreparedCallable.of(pickled, key=key, name=f"package {self._source.name}")

    async def _ask(self, call: PreparedCallable) -> dict[str, str]:
        """Have the package loaded and say what it can do. Raises PackageError with how it went wrong."""
        execution = self._core.submit(
            call,
            DESCRIBE,
            name=f"start of package {self._source.name}",
            limits=self._limits,
            # Tasks that have their turn wait for this one.
            place=self._core.place_apart(),
            on_record=self._on_record,
        )
        outcome = await execution.outcome()
        if not outcome.report.completed:
            raise PackageError(_problem(outcome.report))
        return _task_types(outcome.value)

    def _say(self, loaded: _Loaded) -> None:
        if loaded.call is None:
            logger.error("%s", loaded.problem, extra={"action": "package_broken"})
            self._on_problem(loaded.problem)
        else:
            logger.info(
                "package %s is ready for: %s",
                self._source.name,
                ", ".join(loaded.task_types),
                extra={"action": "package_ready"},
            )


def _module_folders(package: LoadablePackage) -> list[str]:
    """Return the package's folder and, when that is another one, that of its startup file."""
    beside = os.path.dirname(os.path.join(package.folder, package.startup))
    return list(dict.fromkeys([package.folder, beside]))


def _problem(report: ExitReport) -> str:
    """Say what kept a package from starting, in a line and, where there is one, a traceback."""
    if report.reason is EndReason.WALL_TIME:
        allowed = report.wall_seconds
        message = f"it hangs: its imports and startup(client) did not come to an end within {allowed:.0f} s"
    else:
        message = report.message.removeprefix(f"raised ImportError: {CANNOT_LOAD}")
    where = report.stacks or report.traceback or ""
    if message != report.message:
        # The traceback of what stands behind it, which begins below the error that is shown in one line.
        where = where.partition(f"ImportError: {CANNOT_LOAD}")[2].partition("\n")[2]
    # Of an error that says all by itself there is one line, which is the message.
    return f"{message}\n{where.rstrip()}" if "\n" in where.strip() else message


def _task_types(value: Any) -> dict[str, str]:
    """Check what a package says of itself: its process is not to be trusted."""
    if (
        not isinstance(value, dict)
        or len(value) > _MAX_TYPES
        or not all(isinstance(text, str) and len(text) <= _MAX_NAME for item in value.items() for text in item)
    ):
        raise PackageError("its process did not say what it can do")
    return value
