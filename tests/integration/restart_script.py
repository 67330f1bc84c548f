"""A user's script that a server orders to restart: `restart_script.py <api url> <state folder>`."""

from __future__ import annotations

import logging
import os
import sys
import time

from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime, Limits

client = EdgeClient(
    runtime=GrpcEdgeClientRuntime(limits=Limits(abort_grace=0.5), state_dir=sys.argv[2], pass_environment=["STARTS"])
)


def hold(parameters):
    """Log once, then go on until somebody ends this; a stubborn task does not heed an abort."""
    client.log_telemetry({"holds": 1}, check_task_abort=False)
    while True:
        if not parameters.get("stubborn"):
            client.check_task_abort()
        time.sleep(0.01)


def name(parameters):
    return {"start": os.environ["STARTS"]}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    # What the environment says goes on; so the third start knows that it is the third.
    os.environ["STARTS"] = str(int(os.environ.get("STARTS", "0")) + 1)
    numbers = [int(number) for number in os.listdir("/proc/self/fd")]
    open_now = [number for number in numbers if number > 2 and os.path.lexists(f"/proc/self/fd/{number}")]
    print(f"start {os.environ['STARTS']} of {os.getpid()} {sys.orig_argv[1:]} with {open_now}", flush=True)
    client.set_custom_callback("hold", hold)
    client.set_custom_callback("name", name)
    _, options = client.connect_to_api(sys.argv[1], {"name": "script"})
    if not client.init_grpchandler(options):
        sys.exit(1)
    client.run()
    print("run returned", flush=True)
