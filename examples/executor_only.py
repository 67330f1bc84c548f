"""Run training in processes of their own, with limits, without any server.

The first task trains and streams its loss, the second crashes, the third takes more memory than it may. This
program goes on, and is told how each one ended.
"""

import ctypes

import numpy as np

from scaleout_mp import Limits, ScaleoutModel, TaskError, TaskExecutor, current_task


def train(model, settings):
    """Fit a line to noisy points; returns the new model and how well it fits."""
    slope, offset = (array.copy() for array in model.get_training_model())
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, 1000)
    y = 3 * x + 2 + rng.normal(0, 0.1, 1000)
    for step in range(settings["steps"]):
        error = slope * x + offset - y
        loss = float((error**2).mean())
        current_task().log_metric({"loss": loss}, step=step)
        slope -= settings["rate"] * 2 * (error * x).mean()
        offset -= settings["rate"] * 2 * error.mean()
    return ScaleoutModel.from_training_model([slope, offset]), {"loss": loss}


def crash():
    """Read memory that no process has."""
    ctypes.string_at(0)


def devour():
    """Take memory until somebody objects."""
    kept = []
    while True:
        kept.append(np.ones(1_000_000))


def main():
    """Run the three tasks one after the other."""
    model = ScaleoutModel.from_training_model([np.zeros(1), np.zeros(1)])
    with TaskExecutor(limits=Limits(memory="256MiB", wall_time=60), echo_output=False) as executor:
        task = executor.submit(train, model, {"steps": 40, "rate": 0.2})
        for record in task.records():
            if record.step % 10 == 0:
                print(f"step {record.step}: loss {record.metrics['loss']:.4f}")
        trained, metrics = task.result()
        slope, offset = (float(array[0]) for array in trained.get_training_model())
        print(f"learned y = {slope:.2f} x + {offset:.2f}, loss {metrics['loss']:.4f}")

        for function in (crash, devour):
            try:
                executor.submit(function).result()
            except TaskError as error:
                print(f"{type(error).__name__}: {error}")
                print(f"  signal {error.report.signal}, after {error.report.wall_seconds:.2f} s")


if __name__ == "__main__":
    main()
