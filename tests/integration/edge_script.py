"""A user's script, started by tests: `edge_script.py <api url> <callback> <grace>`."""

from __future__ import annotations

import signal
import sys
import time

from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime, Limits

client = EdgeClient(runtime=GrpcEdgeClientRuntime(limits=Limits(abort_grace=float(sys.argv[3]))))


def obedient(model, settings):
    client.log_metric({"ready": 1})
    while True:
        client.check_task_abort()
        time.sleep(0.005)


def stubborn(model, settings):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client.log_metric({"ready": 1})
    while True:
        time.sleep(100)


if __name__ == "__main__":
    client.set_train_callback({"obedient": obedient, "stubborn": stubborn}[sys.argv[2]])
    _, options = client.connect_to_api(sys.argv[1], {"name": "script", "client_id": "script"})
    if not client.init_grpchandler(options):
        sys.exit(1)
    client.run()
    sys.stdout.write("ran to its end\n")
