"""Serve a digits classifier over HTTP: each request runs in the process of the staged model."""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from sklearn.datasets import load_digits

from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime, Limits, ScaleoutError, ScaleoutModel, TaskError


class Digits:
    """What is loaded when the model is staged is there for each request."""

    def stage(self, model):
        """Called once in each process that serves the model."""
        self.weights, self.bias = (np.array(array) for array in model.get_training_model())
        print("staged model", model.model_id, flush=True)

    def infer(self, model, parameters):
        """Called for each request."""
        if parameters.get("crash"):
            ctypes.string_at(0)  # a bug in native code, as the operating system sees it
        scores = np.asarray(parameters["pixels"]) @ self.weights + self.bias
        return {"digits": scores.argmax(axis=1), "model": model.model_id}


def trained_model():
    """Fit a linear classifier to the first 1,500 of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    inputs = np.hstack([images[:1500], np.ones((1500, 1))])
    solution, *_ = np.linalg.lstsq(inputs, np.eye(10)[labels[:1500]], rcond=None)
    return ScaleoutModel.from_training_model([solution[:-1], solution[-1]])


class Handler(BaseHTTPRequestHandler):
    """Answers POST /predict with {"pixels": [[64 numbers], ...]}."""

    def do_POST(self):
        """Ask the model."""
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)))
        except ValueError as error:
            self._answer(400, {"error": f"no JSON: {error}"})
            return
        try:
            answer = self.server.client.run_inference(self.server.model_id, request)
            self._answer(200, {**answer, "digits": answer["digits"].tolist()})
        except TaskError as error:
            # This request alone: the next one gets a process that has staged the model again.
            self._answer(500, {"error": error.report.message, "reason": error.report.reason.value})
        except ScaleoutError as error:
            # Nothing was asked: the model cannot be staged at the moment, or the service is about to end.
            self._answer(503, {"error": str(error)})

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main():
    """Stage a model and serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="0: any that is free")
    port = parser.parse_args().port
    logging.basicConfig(level=logging.WARNING)

    runtime = GrpcEdgeClientRuntime(limits=Limits(memory="1GiB", wall_time=30))
    client = EdgeClient(runtime=runtime)
    digits = Digits()
    client.set_stage_model_callback(digits.stage)
    client.set_inference_callback(digits.infer)
    with client.stage_model(trained_model()) as model, ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.client, server.model_id = client, model.model_id
        print(f"serving at http://127.0.0.1:{server.server_port}/predict; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("bye")
    client.close()


if __name__ == "__main__":
    main()
