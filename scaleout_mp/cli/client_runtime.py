"""What a client's options say to its runtime."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from scaleout_mp.cli.values import assignments, numbers, plain_number, words
from scaleout_mp.config import Limits, Resources, Sandbox

if TYPE_CHECKING:
    from scaleout_mp.cli.client_options import Given

#: Options that the runtime has under the same name, where they were given: numbers may have no unit.
_SAME = (
    "start_method",
    "isolation",
    "state_bytes",
    "memory_budget",
    "max_concurrent_tasks",
    "heartbeat_interval",
    "scratch_folder",
    "working_directory",
    "state_dir",
    "goodbye_seconds",
    "inference_concurrency",
    "inference_idle_time",
)


def runtime_options(given: Given) -> dict[str, Any]:
    """Return the arguments of `GrpcEdgeClientRuntime`. Raises ConfigError that names the field."""
    limits = Limits(**given.limits())
    options: dict[str, Any] = {name: plain_number(given[name]) for name in _SAME if given[name] is not None}
    if options["inference_idle_time"] == "never":
        options["inference_idle_time"] = None
    return {
        **options,
        "limits": limits,
        "inference_limits": dataclasses.replace(limits, **given.inference_limits()),
        "sandbox": Sandbox(level=given["sandbox"], read=given["read"], write=given["write"], network=given["network"]),
        "gpus": None if given["gpus"] is None else words(given["gpus"]),
        "resources": Resources(
            gpus=given["gpus_per_task"] or 0,
            nice=given["nice"] or 0,
            affinity=None if given["affinity"] is None else numbers("affinity", given["affinity"]),
        ),
        "environment": assignments("--env", given["env"]),
        "pass_environment": given["pass_env"],
        "shield": not given["no_shield"],
        "echo_output": not given["hide_output"],
    }
