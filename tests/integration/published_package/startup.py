"""A package as it is written for the published client; nothing in it is of ours."""

from scaleout import EdgeClient
from scaleout.client.task_receiver import StoppedException
from scaleoututil.helpers.helpers import get_helper
from scaleoututil.helpers.plugins.numpyhelper import Helper
from scaleoututil.logging import ScaleoutLogger
from scaleoututil.utils.model import ScaleoutModel

helper = get_helper("numpyhelper")


class Trainer:
    def __init__(self, client: EdgeClient):
        self.client = client

    def train(self, scaleout_model: ScaleoutModel, settings):
        assert isinstance(scaleout_model, ScaleoutModel)
        ScaleoutLogger().info("training")
        weights = [array + 1 for array in scaleout_model.get_training_model(helper)]
        self.client.log_metric({"loss": 0.5})
        if settings.get("wait"):
            try:
                while True:
                    self.client.check_task_abort()
            except StoppedException:
                self.client.log_attributes({"stopped": "yes"}, check_task_abort=False)
                raise
        model = ScaleoutModel.from_training_model(weights, helper)
        return model.to_builder().set_metadata("by", "published").build(), {"training_metadata": {"num_examples": 3}}

    def validate(self, scaleout_model: ScaleoutModel):
        return {"mean": float(scaleout_model.get_training_model(Helper())[0].mean())}

    def where(self, parameters):
        import scaleout

        return {"file": getattr(scaleout, "__file__", None), "model": ScaleoutModel.__module__}


def startup(client: EdgeClient):
    trainer = Trainer(client)
    client.set_train_callback(trainer.train)
    client.set_validate_callback(trainer.validate)
    client.set_custom_callback("where", trainer.where)
