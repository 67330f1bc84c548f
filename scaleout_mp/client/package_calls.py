"""A compute package in the process that runs it: load it, say what it can do, call its callbacks.

The supervisor sends a `PackageOrder` to the template; where it arrives, the package is imported and its
`startup(client)` called. Of the package itself nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import os
import pickle
import sys
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp import compat
from scaleout_mp.client.calls import CustomCall, TrainCall, ValidateCall
from scaleout_mp.client.inference_calls import calls_of
from scaleout_mp.client.package_client import package_client
from scaleout_mp.client.values import callback_name
from scaleout_mp.errors import PackageError
from scaleout_mp.task import current_task, set_current_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from scaleout_mp.client.edge_client import EdgeClient
    from scaleout_mp.client.package_client import PackageRuntime

#: In the place of a task type: says which task types there are, as {type: name of the callback}.
DESCRIBE: Final = "describe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageOrder:
    """Which package to load, for which client."""

    #: The folder with `scaleout.yaml` in it.
    folder: str
    #: File with `startup(client)` in it, below `folder`.
    startup: str
    #: Another one means: load the package anew.
    version: str
    client_name: str
    client_id: str

    def __reduce__(self) -> tuple[Any, ...]:
        return load_package, (self.folder, self.startup, self.client_name, self.client_id)

    def pickled(self) -> tuple[str, bytes]:
        """Return the key and the pickle by which the template loads the package."""
        pickled = pickle.dumps(self)
        return hashlib.blake2b(self.version.encode() + pickled, digest_size=16).hexdigest(), pickled


class Package:
    """A loaded package; called with a task's type and the arguments of that type's call."""

    def __init__(self, client: EdgeClient, runtime: PackageRuntime) -> None:
        self._client = client
        self._runtime = runtime

    def __call__(self, task_type: str, *args: Any) -> Any:
        """Run the callback for a task of this type. Raises PackageError when there is none."""
        if task_type == DESCRIBE:
            self._runtime.send_early()
            return self.task_types()
        of_staged_model = self._of_staged_models().get(task_type)
        if of_staged_model is not None:
            return of_staged_model(*args)
        callback = self._callbacks().get(task_type)
        if callback is None:
            raise PackageError(f"the package registers no callback for tasks of type {task_type!r}")
        calls: dict[str, Callable[..., Any]] = {"Scaleout_ModelUpdate": TrainCall, "Scaleout_Validation": ValidateCall}
        return calls.get(task_type, CustomCall)(callback)(*args)

    def task_types(self) -> dict[str, str]:
        """Return the types of task that it serves, each with the name of its callback."""
        callbacks = {known: callback_name(callback) for known, callback in self._callbacks().items()}
        of_models = {
            # Without a stage callback, models are staged for the inference callback alone.
            known: callback_name(call.callback or self._client.inference_callback)
            for known, call in self._of_staged_models().items()
        }
        return callbacks | of_models

    def _of_staged_models(self) -> dict[str, Any]:
        return calls_of(self._client.stage_model_callback, self._client.inference_callback)

    def _callbacks(self) -> dict[str, Callable[..., Any]]:
        client = self._client
        slots = {"Scaleout_ModelUpdate": client.train_callback, "Scaleout_Validation": client.validate_callback}
        return {kind: callback for kind, callback in slots.items() if callback is not None} | (
            client.registered_callbacks
        )


def load_package(folder: str, startup: str, client_name: str, client_id: str) -> Package:
    """Import a package and let it register its callbacks.

    Raises PackageError, in one line, when it has no usable `startup`, and whatever its own code raises.
    """
    path = os.path.join(folder, startup)
    _forget_modules(folder)
    compat.install()
    client, runtime = package_client(client_name, client_id, folder)
    with _no_task():
        module = _import_file(path)
        function = getattr(module, "startup", None)
        if not callable(function):
            raise PackageError(f"{path} has no function startup(client)")
        function(client)
    package = Package(client, runtime)
    if not package.task_types():
        raise PackageError(
            f"startup(client) in {path} registers no callback; it must call client.set_train_callback, "
            "client.set_validate_callback, client.set_inference_callback or client.set_custom_callback"
        )
    return package


def _forget_modules(folder: str) -> None:
    """Drop what a worker has of an earlier version: a task may have been given to it before the package changed."""
    below = os.path.join(folder, "")
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(below):
            del sys.modules[name]
    importlib.invalidate_caches()


@contextlib.contextmanager
def _no_task() -> Iterator[None]:
    """Keep a package that is loaded by a task's own process from logging in the name of that task."""
    task = current_task()
    set_current_task(None)
    try:
        yield
    finally:
        set_current_task(task)


def _import_file(path: str) -> ModuleType:
    """Import a file as a module of the name of the file, so that others which import it find the same one."""
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise PackageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
