"""A client of ours whose tasks log: `records_client.py API_URL`."""

from __future__ import annotations

import sys
import time
from typing import Any

from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime
from scaleout_mp.config import Settings

settings = Settings(polling_interval=0.2, send_telemetry=False)
client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=settings, state_dir=sys.argv[2]))


def burst(parameters: dict[str, Any]) -> dict[str, float]:
    """Log as fast as that goes; return the seconds that it took."""
    begun = time.perf_counter()
    for step in range(parameters["count"]):
        client.log_metric({"loss": 0.5}, step=step)
    return {"seconds": time.perf_counter() - begun}


def paced(parameters: dict[str, Any]) -> dict[str, float]:
    """Log once for each training step of so many seconds; return the median of what a call took, in microseconds."""
    took = []
    for step in range(parameters["count"]):
        end = time.perf_counter_ns() + int(parameters["step"] * 1e9)
        while time.perf_counter_ns() < end:
            pass
        begun = time.perf_counter_ns()
        client.log_metric({"loss": 0.5}, step=step)
        took.append(time.perf_counter_ns() - begun)
    return {"us": sorted(took)[len(took) // 2] / 1e3}


if __name__ == "__main__":
    client.set_custom_callback("burst", burst)
    client.set_custom_callback("paced", paced)
    _, options = client.connect_to_api(sys.argv[1], {"name": "ours", "client_id": "ours"})
    if not client.init_grpchandler(options):
        sys.exit("no combiner")
    client.run()
