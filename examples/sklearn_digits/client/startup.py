"""The package's entrance: `startup` is called once, in a process of the client's that runs user code."""

from data import load_data
from model import get_weights, make_model, set_weights
from scaleout import EdgeClient
from scaleoututil.utils.model import ScaleoutModel

EPOCHS = 3


class DigitsClient:
    """Holds the client, the data and, from one call to the next, what the optimiser has learned about step sizes."""

    def __init__(self, client: EdgeClient):
        self.client = client
        self.data = None
        self.model = make_model()
        self.calls = 0

    def train(self, scaleout_model: ScaleoutModel, client_settings: dict):
        """Train for a few epochs on this client's own images."""
        images, labels = self._training()
        set_weights(self.model, scaleout_model.get_training_model())
        self.calls += 1
        for epoch in range(client_settings.get("epochs", EPOCHS)):
            self.model.partial_fit(images, labels)
            self.client.log_metric({"loss": self.model.loss_}, step=epoch)
        # Counts on where the process stays (--isolation worker); where it does not, each task is the first.
        print(f"{self.client.name} has trained {self.calls} times", flush=True)
        weights = get_weights(self.model)
        return ScaleoutModel.from_training_model(weights), {"training_metadata": {"num_examples": len(labels)}}

    def validate(self, scaleout_model: ScaleoutModel):
        """Measure a model on images that it was not trained on here."""
        images, labels = self._validation()
        set_weights(self.model, scaleout_model.get_training_model())
        return {"accuracy": float(self.model.score(images, labels))}

    def _training(self):
        # Loaded at the first call, in the process that needs it.
        self.data = self.data or load_data(self.client.name)
        return self.data[0]

    def _validation(self):
        self._training()
        return self.data[1]


def startup(client: EdgeClient):
    """Register the callbacks."""
    digits = DigitsClient(client)
    client.set_train_callback(digits.train)
    client.set_validate_callback(digits.validate)
