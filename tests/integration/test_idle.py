"""What a client costs that waits: memory, processor time, and the import."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from observing import wait_until
from programs_at_work import Program

from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import HeartbeatReceived

MIB = 1 << 20

SCRIPT = """
import sys
from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime

def train(model, settings):
    return model, {"training_metadata": {"num_examples": 1}}

# Open to an ordinary user who looks at its memory; that costs and saves none.
client = EdgeClient(train, runtime=GrpcEdgeClientRuntime(shield=False, sandbox="none"))
result, options = client.connect_to_api(sys.argv[1], {"name": "idle"})
assert client.init_grpchandler(options), result
client.run(with_heartbeat=True)
"""


@pytest.fixture
def idle(tmp_path):
    """Yield the processes of a client that has nothing to do, and its network."""
    script = tmp_path / "idle.py"
    script.write_text(SCRIPT)
    with LocalNetworkThread(tmp_path / "net") as net, Program(script, net.api_url) as program:
        net.wait_for(lambda event: isinstance(event, HeartbeatReceived), timeout=30)
        client = psutil.Process(program.pid)
        # The guardian, and below it the template, which goes on loading.
        wait_until(lambda: len(client.children(recursive=True)) == 2, seconds=20)
        after_heartbeats(net, 2)
        yield [client, *client.children(recursive=True)], net
        program.terminate()
        assert program.end(seconds=20) == 0, program.output


def after_heartbeats(net, count):
    """Wait for so many more, which come every two seconds."""
    before = len(net.events.of(HeartbeatReceived))
    net.wait_for(lambda _: len(net.events.of(HeartbeatReceived)) >= before + count, timeout=30)


def test_an_idle_client_is_small_and_quiet(idle):
    processes, net = idle
    # As the kernel counts it, which shares out what other programs here use as well.
    assert sum(pss(process.pid) for process in processes) < 80_000_000
    # As it would be where nothing else runs Python.
    alone = memory_if_alone([process.pid for process in processes])
    assert alone < 90 * MIB, f"{alone / MIB:.1f} MiB"
    before, started = seconds_used(processes), time.monotonic()
    after_heartbeats(net, 3)
    used = (seconds_used(processes) - before) / (time.monotonic() - started)
    assert used < 0.01, f"{used:.2%} of a processor"


def seconds_used(processes):
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def pss(pid):
    return 1024 * int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1])


def memory_if_alone(pids):
    """Return the bytes that processes would have if they shared with nobody else: file pages count once, and whole."""
    private, files = 0, {}
    for pid in pids:
        for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE)[
            1:
        ]:
            _, _, offset, device, inode = area.split(maxsplit=5)[:5]
            sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", area, re.MULTILINE)}
            if inode == "0":
                # Shared, if at all, by a fork, with another of these.
                private += sizes["Pss"]
                continue
            private += sizes["Anonymous"]
            place = device, inode, offset
            files[place] = max(files.get(place, 0), sizes["Rss"] - sizes["Anonymous"])
    return private + sum(files.values())


def test_the_import_is_quick():
    code = "import time; begun = time.perf_counter(); import scaleout_mp; print(time.perf_counter() - begun)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    # The quickest: the others say how busy this machine is.
    assert min(float(done.stdout) for done in runs) < 0.15
