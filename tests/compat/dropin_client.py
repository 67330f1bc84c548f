"""A published client on our runtime: run by an interpreter that has both. Arguments: API URL, isolation."""

import os
import sys

import numpy as np
from scaleout import EdgeClient
from scaleout.client.edge_client import ConnectToApiResult
from scaleout.client.task_receiver import StoppedException
from scaleoututil.helpers.helpers import get_helper
from scaleoututil.utils.model import ScaleoutModel

import scaleout_mp
from scaleout_mp.config import Settings

url, isolation = sys.argv[1:]
helper = get_helper("numpyhelper")
runtime = scaleout_mp.GrpcEdgeClientRuntime(
    limits=scaleout_mp.Limits(abort_grace=2), isolation=isolation, settings=Settings.from_environ(polling_interval=0.1)
)
supervisor = os.getpid()


class Trainer:
    def __init__(self, client):
        self.client = client

    def train(self, model, settings):
        assert isinstance(model, ScaleoutModel)
        assert os.getpid() != supervisor
        if settings.get("crash"):
            os.kill(os.getpid(), 11)
        if settings.get("wait"):
            try:
                self.client.log_metric({"waits": 1})
                while True:
                    self.client.check_task_abort()
            except StoppedException:
                self.client.log_attributes({"stopped": "yes"}, check_task_abort=False)
                raise
        arrays = [array + np.float32(1) for array in model.get_training_model(helper)]
        for step in range(3):
            self.client.log_metric({"loss": 1.0}, step=step)
        self.client.log_telemetry({"heat": 40.0})
        return ScaleoutModel.from_training_model(arrays, helper), {"training_metadata": {"num_examples": 3}}

    def validate(self, model):
        return {"mean": float(model.get_training_model(helper)[0].mean())}


client = EdgeClient(runtime=runtime)
trainer = Trainer(client)
client.set_train_callback(trainer.train)
client.set_validate_callback(trainer.validate)
result, config = client.connect_to_api(url, {"name": "dropin", "package": "local", "client_id": "id-dropin"})
if result is not ConnectToApiResult.Assigned:
    sys.exit(f"not assigned: {result} {config}")
if not client.init_grpchandler(config):
    sys.exit("no combiner")
client.log_attributes({"site": 7})
client.run()
