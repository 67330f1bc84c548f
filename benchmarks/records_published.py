"""The published package's handler, which sends a metric in each call: `records_published.py HOST PORT`.

Runs in an environment of its own, so it imports nothing of this folder. For each line "COUNT PAUSE" of its standard
input it sends so many metrics, with so many seconds of work before each, and answers with the median of what a call
took, in microseconds.
"""

import contextlib
import os
import sys
import time
import types

os.environ["SCALEOUT_GRPC_SECURE"] = "false"
answers = os.fdopen(os.dup(1), "w")
# It logs a line for each metric, to whom nobody listens here.
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(1, 2)

from scaleout.client.grpc_handler import GrpcHandler  # noqa: E402
from scaleoututil.grpc import scaleout_pb2 as pb  # noqa: E402

handler = GrpcHandler(
    types.SimpleNamespace(client_id="theirs", name="theirs", token_manager=None), sys.argv[1], int(sys.argv[2])
)


def send(step: int) -> None:
    """Send a metric as the published client does for log_metric."""
    metric = pb.ModelMetric(client_id="theirs", model_id="m", round_id="r", session_id="s")
    metric.timestamp.GetCurrentTime()
    metric.step.value = step
    metric.metrics.add(key="loss", value=0.5)
    handler.send_model_metric(metric)


with contextlib.suppress(KeyboardInterrupt):
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        count, pause = line.split()
        took = []
        for step in range(int(count)):
            end = time.perf_counter() + float(pause)
            while time.perf_counter() < end:
                pass
            begun = time.perf_counter_ns()
            send(step)
            took.append(time.perf_counter_ns() - begun)
        print(sorted(took)[len(took) // 2] / 1e3, file=answers, flush=True)
