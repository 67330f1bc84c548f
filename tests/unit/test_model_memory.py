"""What models cost: memory while they are built and read, and nothing when they are gone."""

import json
import subprocess
import sys

import psutil
import pytest

COMMON = """
import gc, json, os, resource, sys
import numpy as np
from scaleout_mp.model import ScaleoutModel

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def maps():
    with open("/proc/self/maps") as file:
        return sum("scaleout-model" in line or ".scm" in line for line in file)
"""

BUILD = """
size, kind = int(sys.argv[1]), sys.argv[2]
if kind == "strided":
    arrays = [np.full((size // 8, 2), 1.5, np.float32)[:, ::2] for _ in range(2)]
elif kind == "deflate":
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(size // 40, dtype=np.float32) for _ in range(10)]
else:
    # What is not compressed may be anything, and noise takes longer than the model.
    arrays = [np.arange(size // 40, dtype=np.float32) for _ in range(10)]
options = {"compression": "deflate"} if kind == "deflate" else {"compression": "stored", "checksum": kind == "checksum"}
before = status("VmRSS")
# Forget the peak up to here: proc_pid_clear_refs(5).
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
model = ScaleoutModel.from_training_model(arrays, **options)
# Nobody has mapped the memory while it was filled, so that it is not in the peak.
print((status("VmHWM") - before + model.size) / model.size)
"""

LOAD = """
path, size = sys.argv[1], int(sys.argv[2])
arrays = [np.arange(size // 40, dtype=np.float32) for _ in range(10)]
ScaleoutModel.from_training_model(arrays, compression="stored").save_to_file(path)
del arrays
gc.collect()
ScaleoutModel.from_training_model([np.arange(10)]).get_training_model()
grown = {}
for kind in ("file", "memory"):
    before = status("RssAnon")
    if kind == "file":
        model = ScaleoutModel.from_file(path)
    else:
        with open(path, "rb") as file:
            model = ScaleoutModel.from_stream(file)
    arrays = model.get_training_model()
    assert sum(float(array[-1]) for array in arrays) > 0
    assert all(np.isfinite(array.sum()) for array in arrays)
    grown[kind] = (status("RssAnon") - before) / size
    del arrays
    model.close()
print(json.dumps(grown))
"""

CYCLES = """
count = int(sys.argv[1])
weights = [np.arange(3000, dtype=np.float32), np.ones(10)]

def cycle(index):
    options = {"compression": ("stored", "deflate", "auto")[index % 3], "checksum": index % 2 == 0}
    model = ScaleoutModel.from_training_model(weights, **options)
    model.get_training_model()
    renamed = model.to_builder().set_model_id(str(index)).build()
    if index % 5 == 0:
        renamed.fileno()
    if index % 2:
        # The other half goes by itself.
        model.close()
        renamed.close()

for index in range(1000):
    cycle(index)
gc.collect()
before = status("VmRSS"), descriptors(), maps()
for index in range(count):
    cycle(index)
gc.collect()
after = status("VmRSS"), descriptors(), maps()
print(json.dumps({"grown": after[0] - before[0], "descriptors": after[1] - before[1], "maps": after[2]}))
"""


def run(script: str, *arguments: object, folder) -> str:
    result = subprocess.run(
        [sys.executable, "-c", COMMON + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def temporary(tmp_path):
    """A temp folder in which nothing is ever written."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def need(size: int) -> None:
    if psutil.virtual_memory().available < size:
        pytest.skip(f"needs {size >> 20} MiB of free memory")


@pytest.mark.parametrize(
    ("kind", "size"), [("stored", 10**9), ("checksum", 2 * 10**8), ("strided", 4 * 10**8), ("deflate", 2 * 10**8)]
)
def test_building_takes_little_more_than_the_model(temporary, kind, size):
    need(3 * size)
    assert float(run(BUILD, size, kind, folder=temporary)) < 1.1


def test_reading_takes_no_memory_of_ones_own(temporary, tmp_path):
    size = 4 * 10**8
    need(3 * size)
    grown = json.loads(run(LOAD, tmp_path / "model.scm", size, folder=temporary))
    assert max(grown.values()) < 0.02, grown


def test_ten_thousand_models_leave_nothing(temporary):
    left = json.loads(run(CYCLES, 10_000, folder=temporary))
    assert left["descriptors"] == 0
    assert left["maps"] == 0
    assert left["grown"] < 2 << 20
