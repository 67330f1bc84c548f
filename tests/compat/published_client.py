"""A client on the published package: run by the interpreter that has it, never imported by the tests.

Arguments: API URL, client name, number of examples, token (may be empty).
"""

import sys
import time

import numpy as np
from scaleout import EdgeClient
from scaleout.client.edge_client import ConnectToApiResult
from scaleoututil.helpers.helpers import get_helper
from scaleoututil.utils.model import ScaleoutModel

url, name, examples, token = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
helper = get_helper("numpyhelper")


def train(model, settings):
    arrays = model.get_training_model(helper)
    for step in range(int(settings["steps"])):
        arrays = [array + np.float32(settings["rate"]) for array in arrays]
        client.log_metric({"weight": float(arrays[0].ravel()[0])}, step=step)
    out = ScaleoutModel.from_training_model(arrays, helper)
    return out, {"training_metadata": {"num_examples": examples}}


def validate(model):
    return {"weight": float(model.get_training_model(helper)[0].ravel()[0])}


staged = []


def stage(model):
    staged.append(float(model.get_training_model(helper)[0].ravel()[0]))


def infer(model, parameters):
    answer = staged[-1] * parameters["times"]
    client.log_attributes({"answer": str(answer)})
    return {"answer": answer}


def echo(parameters):
    client.log_telemetry(telemetry={"said": float(parameters["number"])})
    return parameters


def wait(parameters):
    while True:
        client.check_task_abort()
        time.sleep(0.01)


client = EdgeClient(train, validate)
client.set_custom_callback("echo", echo)
client.set_custom_callback("wait", wait)
client.set_stage_model_callback(stage)
client.set_inference_callback(infer)
# Called again while the network starts up, as the published command line does.
result, config = client.connect_to_api(
    url, {"name": name, "package": "local", "client_id": f"id-{name}"}, token or None
)
if result is not ConnectToApiResult.Assigned:
    sys.exit(f"not assigned: {result} {config}")
if not client.init_grpchandler(config, token or None, url):
    sys.exit("no combiner")
client.log_attributes({"site": name})
client.run(with_heartbeat=True)
