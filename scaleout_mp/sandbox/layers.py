"""The layers of confinement: what a level consists of, what of it this machine takes, and what is put on where.

What every task of a template has in common the template puts on before it loads the user's code: the code is confined
while it is imported, and tasks inherit all of it for nothing. What is of one task alone it puts on itself.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from typing import TYPE_CHECKING, Any, Final, Self

from scaleout_mp.config.sandbox import Level, Sandbox
from scaleout_mp.sandbox import capabilities, landlock, namespaces, probe, process, seccomp, view
from scaleout_mp.sandbox.files import FileAccess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Layer(enum.StrEnum):
    """One kind of confinement, as reports name it."""

    #: Set-id programs give nothing.
    NO_NEW_PRIVILEGES = "no new privileges"
    #: Of root's privileges those that reach beyond files are gone, at level strict all.
    FEWER_PRIVILEGES = "fewer privileges"
    #: seccomp.
    FILTER = "system call filter"
    #: Landlock: no look into processes outside.
    DOMAIN = "Landlock domain"
    #: Landlock: no signals and no abstract sockets to processes outside.
    SIGNALS = "Landlock signals and sockets"
    #: Landlock: files.
    FILES = "Landlock files"
    #: Landlock: no TCP.
    TCP = "Landlock TCP"
    USERS = "user namespace"
    NETWORK = "network namespace"
    IPC = "IPC namespace"
    MOUNTS = "mount namespace"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the tasks of one template have to put up with. Made by the executor, sent to the template."""

    level: Level = Level.AUTO
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    network: bool = False
    #: Folders in which each task has something of its own, such as its scratch folder.
    places: tuple[str, ...] = ()

    @classmethod
    def of(cls, sandbox: Sandbox, *, read: Sequence[str] = (), places: Sequence[str] = ()) -> Self:
        """Return the rules for what the user chose, with more to read."""
        return cls(
            level=Level(sandbox.level),
            read=(*(os.fspath(path) for path in sandbox.read), *read),
            write=tuple(os.fspath(path) for path in sandbox.write),
            network=sandbox.network,
            places=tuple(places),
        )

    def to_fields(self) -> dict[str, Any]:
        """Return what a frame carries: file names need not be text."""
        paths = {name: [os.fsencode(path) for path in getattr(self, name)] for name in ("read", "write", "places")}
        return {"level": self.level.value, "network": self.network, **paths}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Read what `to_fields` returned."""
        paths = {name: tuple(map(os.fsdecode, fields[name])) for name in ("read", "write", "places")}
        return cls(level=Level(fields["level"]), network=fields["network"], **paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnLayers:
    """What each task puts on itself, beside what came from its template."""

    #: Made by `seccomp.build_own`; None: no filter.
    filter: bytes | None = None
    #: Whether it gets a Landlock domain.
    domain: bool = False
    #: What it may use, without its scratch folder; None: all that its template may.
    files: FileAccess | None = None

    def put_on_early(self) -> None:
        """Put on what is the same for every task: a process that waits for its task has the time. Raises OSError."""
        if self.domain and self.files is None:
            with landlock.Ruleset() as rules:
                rules.restrict()

    def put_on(self, scratch: str) -> None:
        """Put on the rest, after `put_on_early`. Raises OSError: then no user code may run."""
        if self.domain and self.files is not None:
            with landlock.Ruleset(files=True) as rules:
                self.files.and_write(scratch).add_to(rules)
                rules.restrict()
        if self.filter is not None:
            seccomp.install(seccomp.for_process(self.filter, os.getpid()))

    def to_fields(self) -> dict[str, Any]:
        """Return what a frame carries."""
        files = None if self.files is None else self.files.to_fields()
        return {"filter": self.filter, "domain": self.domain, "files": files}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Read what `to_fields` returned."""
        files = fields["files"]
        return cls(
            filter=fields["filter"],
            domain=fields["domain"],
            files=None if files is None else FileAccess.from_fields(files),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What came of preparing a template."""

    own: OwnLayers = dataclasses.field(default_factory=OwnLayers)
    #: What its tasks have on.
    in_force: tuple[Layer, ...] = ()
    #: What this machine refuses of the level, and why: one sentence each.
    missing: tuple[str, ...] = ()


def prepare(rules: Rules, protected: Sequence[int]) -> Preparation:
    """Put on what every task of a template inherits. Called in the template, before user code is loaded there.

    `protected` are pids that neither the template nor its tasks may touch; tasks may not touch the template either.
    Each part is tried in a process that is thrown away. Raises OSError when one works there and not here.
    """
    if rules.level is Level.NONE:
        return Preparation()
    return _Preparing(rules).run(protected)


#: What a process needs below /proc while it becomes a task; a task itself writes nothing there.
_PROC: Final = "/proc"


class _Preparing:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._strict = rules.level is Level.STRICT
        self._in_force: list[Layer] = []
        self._missing: list[str] = []
        self._own = OwnLayers()

    def run(self, protected: Sequence[int]) -> Preparation:
        process.forbid_new_privileges()
        self._in_force.append(Layer.NO_NEW_PRIVILEGES)
        files = self._enter_namespaces() if self._strict else None
        if self._rules.level is not Level.BASIC:
            self._put_on_landlock(files)
        self._try(
            Layer.FEWER_PRIVILEGES,
            lambda: capabilities.keep(0 if self._strict else capabilities.OF_TRAINING),
            "tasks keep the privileges of this user",
        )
        # The memory and the descriptors of the template are nothing for its tasks, which undo it for themselves.
        process.set_dumpable(False)
        self._put_on_filter(protected)
        return Preparation(own=self._own, in_force=tuple(self._in_force), missing=tuple(self._missing))

    def _try(self, layer: Layer, action: Callable[[], object], without: str) -> bool:
        refused = probe.refusal(action)
        if refused is not None:
            self._missing.append(f"{without}: {refused}")
            return False
        action()
        self._in_force.append(layer)
        return True

    def _enter_namespaces(self) -> FileAccess:
        rules = self._rules
        # They must be there before the file tree is built.
        files = FileAccess.of_this_interpreter(read=rules.read, write=rules.write, network=rules.network)
        with_places = files.and_write(_PROC, *rules.places)
        self._try(Layer.USERS, namespaces.enter_own_users, "tasks share this user's namespace")
        if not rules.network:
            self._try(Layer.NETWORK, namespaces.enter_own_network, "tasks have no network of their own")
        self._try(Layer.IPC, namespaces.enter_own_ipc, "tasks share System V memory with other processes")

        def enter_view() -> None:
            namespaces.enter_own_mounts()
            view.enter(with_places)

        self._try(Layer.MOUNTS, enter_view, "tasks see the file tree of this machine")
        return files

    def _put_on_landlock(self, files: FileAccess | None) -> None:
        rules = self._rules
        # In a network of its own, the processes of a task may talk.
        no_tcp = self._strict and not rules.network and Layer.NETWORK not in self._in_force

        def restrict() -> None:
            with landlock.Ruleset(files=files is not None, tcp=no_tcp) as ruleset:
                if files is not None:
                    files.and_write(_PROC, *rules.places).add_to(ruleset)
                ruleset.restrict()

        without = "tasks can look into other processes" + (" and use all files" if self._strict else "")
        if not self._try(Layer.DOMAIN, restrict, without):
            return
        version = landlock.abi()
        if version >= landlock.SCOPES_SINCE:
            self._in_force.append(Layer.SIGNALS)
        else:
            self._missing.append(f"tasks can signal other processes: Landlock is of version {version}, not 6")
        if files is not None:
            self._in_force.append(Layer.FILES)
        if no_tcp and version >= landlock.TCP_SINCE:
            self._in_force.append(Layer.TCP)
        # Another domain for each task: it keeps tasks out of the template and of each other.
        own_files = None if files is None else files.coarser(rules.places)
        self._own = dataclasses.replace(self._own, domain=True, files=own_files)

    def _put_on_filter(self, protected: Sequence[int]) -> None:
        families = seccomp.Families.ALL
        if self._strict:
            reachable = self._rules.network or Layer.NETWORK in self._in_force
            families = seccomp.Families.NETWORK if reachable else seccomp.Families.LOCAL
        without = "tasks have no system call filter" + (" and can use the network" if self._strict else "")
        try:
            base, own = seccomp.build_base(protected, families), seccomp.build_own(os.getpid())
        except OSError as error:
            self._missing.append(f"{without}: {error.strerror}")
            return

        def put_on() -> None:
            seccomp.install(base)
            seccomp.install(own)

        refused = probe.refusal(put_on)
        if refused is not None:
            self._missing.append(f"{without}: {refused}")
            return
        seccomp.install(base)
        self._in_force.append(Layer.FILTER)
        self._own = dataclasses.replace(self._own, filter=own)
