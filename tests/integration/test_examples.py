"""The examples, run as their readers run them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from programs_at_work import Program

from scaleout_mp import ScaleoutModel
from scaleout_mp.localnet import LocalNetworkThread, SessionPlan

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DIGITS = EXAMPLES / "numpy_digits"
SKLEARN = EXAMPLES / "sklearn_digits"
PYTORCH = EXAMPLES / "pytorch_digits"
NOTEBOOK = EXAMPLES / "notebook" / "federated.ipynb"


def test_executor_only():
    with Program(EXAMPLES / "executor_only.py") as program:
        assert program.end(seconds=60) == 0
        assert "learned y = 3.00 x + 2.00" in program.output
        assert "TaskCrashed: task crash: crashed with SIGSEGV" in program.output
        assert "TaskKilled: task devour: passed its memory limit of 256 MiB" in program.output
        program.require_nothing_left(seconds=1)


@contextlib.contextmanager
def session(tmp_path, write_seed, *, rounds, clients):
    """Run a local network with a session; yield its program and address, and see it end well."""
    with Program(*write_seed, tmp_path / "seed.npz") as seed:
        assert seed.end(seconds=60) == 0, seed.output
    plan = ("--seed", tmp_path / "seed.npz", "--rounds", rounds, "--min-clients", clients, "--min-updates", clients)
    place = ("--folder", tmp_path / "network", "--api-port", "0", "--combiner-port", "0", "--token", "secret")
    with Program("-m", "scaleout_mp", "localnet", *plan, *place) as network:
        address = re.search(r"http://\S+?(?=,)", network.wait_for_line("API at", seconds=20))[0]
        yield network, address
        assert network.end(seconds=10) == 0
        assert "the session's last model is" in network.lines[-1]


def client(*command, **environment):
    """Start a client that asks for tasks often."""
    quick = {"SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.3", "no_proxy": "127.0.0.1"}
    return Program(*command, env={**quick, **environment})


def accuracy(network, number, *, seconds):
    """Wait for the end of a round and return what its validations found."""
    line = network.wait_for_line(f"round {number} finished", seconds=seconds)
    return float(re.search(r"accuracy ([\d.]+)", line)[1])


def end_all(*clients):
    for one in clients:
        one.terminate()
    for one in clients:
        assert one.end(seconds=15) == 0, one.output
        one.require_nothing_left(seconds=1)
        assert "Traceback" not in one.output


def test_the_client_in_the_readme_serves_a_session_as_it_is_typed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    typed = next(block for block in blocks if "client.run(" in block)
    address = "http://127.0.0.1:8092"
    assert typed.count(address) == 1
    script = tmp_path / "client.py"
    with LocalNetworkThread(tmp_path / "network") as network:
        # The port that it names may be taken on this machine.
        script.write_text(typed.replace(address, network.api_url))
        with client(script) as program, ScaleoutModel.from_training_model([np.ones(3)]) as seed:
            result = network.run_session(SessionPlan(rounds=1, client_settings={"epochs": 2}), seed, timeout=60)
            assert result.rounds[0].metrics == {"mean": pytest.approx(0.81)}
            end_all(program)


def test_numpy_digits(tmp_path):
    with session(tmp_path, [DIGITS / "seed.py"], rounds=3, clients=2) as (network, address):
        options = ("--api-url", address, "--token", "secret", "--of", "2", "--shard")
        with client(DIGITS / "client.py", *options, 1) as one, client(DIGITS / "client.py", *options, 2) as two:
            assert accuracy(network, 3, seconds=60) > 0.8
            end_all(one, two)


def test_scikit_learn_as_a_package_and_as_a_script(tmp_path):
    with session(tmp_path, [SKLEARN / "client" / "model.py"], rounds=2, clients=2) as (network, address):
        options = ("--api-url", address, "--token", "secret", "--name")
        package = ("client", "start", "--package", SKLEARN / "client", "--isolation", "worker", "--memory", "1GiB")
        with (
            client("-m", "scaleout_mp", *package, *options, "hospital", XDG_RUNTIME_DIR=str(tmp_path)) as one,
            client(SKLEARN / "script.py", *options, "laptop") as two,
        ):
            assert accuracy(network, 2, seconds=90) > 0.8
            # The object that the package's startup made stayed from task to task.
            one.wait_for_line("hospital has trained 2 times", seconds=10)
            end_all(one, two)


@pytest.mark.timeout(240)
def test_pytorch_with_data_loader_workers(tmp_path):
    pytest.importorskip("torch", reason='PyTorch is not installed: pip install "scaleout-mp[torch]"')
    with session(tmp_path, [PYTORCH / "seed.py"], rounds=1, clients=2) as (network, address):
        options = ("--api-url", address, "--token", "secret", "--of", "2", "--shard")
        with client(PYTORCH / "client.py", *options, 1) as one, client(PYTORCH / "client.py", *options, 2) as two:
            assert accuracy(network, 1, seconds=150) > 0.6
            end_all(one, two)


def test_crash_and_recover():
    with client(EXAMPLES / "crash_and_recover" / "session.py") as program:
        assert program.end(seconds=60) == 0, program.output
        for wanted in (
            "FAILED: crashed with SIGSEGV",
            "FAILED: passed its memory limit of 256 MiB",
            "FAILED: showed no progress for 2 s",
            *(f"round {number}: 1 of 2 updates" for number in (1, 2, 3)),
            "round 4: 2 of 2 updates",
        ):
            assert wanted in program.output
        assert program.lines[-1] == "session finished, 4 rounds"
        assert "Traceback" not in program.output
        program.require_nothing_left(seconds=1)


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    pytest.importorskip("nbclient", reason="nbclient is not installed: `make test` has it")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: `make test` has it")
    executed = tmp_path / "executed.ipynb"
    # In a process of its own: Jupyter's modules warn, and keep loops and sockets open.
    execute = "import sys; from nbclient.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", execute, "--output", str(executed), "--timeout", "60", str(NOTEBOOK)]
    places = {name: str(tmp_path) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **places, "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in json.loads(executed.read_text())["cells"] for output in cell.get("outputs", ())]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    shown = ["".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]
    assert float(re.search(r"after 40 epochs ([\d.]+)", text)[1]) > 0.8
    assert re.search(r"round 2: 1 update, accuracy 0\.\d\d", text)
    assert text.endswith("stopped\n")
    assert "ScaleoutModel" in shown[0]
    assert "crashed with SIGSEGV" in shown[1]


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_inference_service(tmp_path):
    images, labels = sklearn_digits()
    with Program(EXAMPLES / "inference_service" / "serve.py", "--port", "0", cwd=tmp_path) as service:
        address = re.search(r"http://\S+(?=;)", service.wait_for_line("serving at", seconds=60))[0]

        def post(body):
            request = urllib.request.Request(address, json.dumps(body).encode())
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(request, timeout=30) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error)

        status, answer = post({"pixels": images[1500:1700].tolist()})
        assert status == 200
        assert np.mean(np.array(answer["digits"]) == labels[1500:1700]) > 0.8
        status, failed = post({"crash": True})
        assert (status, failed) == (500, {"error": "crashed with SIGSEGV", "reason": "crashed"})
        assert post({"pixels": images[1500:1700].tolist()}) == (200, answer)
        service.send(signal.SIGINT)
        assert service.end(seconds=20) == 0
        assert service.output.count("staged model") == 2
        assert (tmp_path / ".scaleout" / "model_cache" / f"{answer['model']}.scm").exists()
        service.require_nothing_left(seconds=2)


def sklearn_digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed: `make install` has it")
    return datasets.load_digits(return_X_y=True)
