"""Feed the model reader what libFuzzer invents: every answer is a model or a ModelError.

    make fuzz

With valid models to start from, in a temporary folder that goes afterwards. What is found is written to FUZZ_FINDINGS,
by default the temp folder; run the file with such a finding as argument to see it again.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import zipfile

import atheris

with atheris.instrument_imports(include=["scaleout_mp.model"]):
    from scaleout_mp.errors import ModelError
    from scaleout_mp.model import ContainerLimits, ScaleoutModel, SealedMemory
    from scaleout_mp.model.container import METADATA, Container
    from scaleout_mp.model.npz import decode_array, read_arrays
    from scaleout_mp.model.zip_reader import ArchiveLimits

import numpy as np

SECONDS = 60
LIMIT = 1 << 22
LIMITS = ContainerLimits(max_size=LIMIT, max_inflated=LIMIT, max_entries=64, max_arrays=256, max_metadata=1 << 16)
ARCHIVE_LIMITS = ArchiveLimits(max_entries=256, max_inflated=LIMIT)


def one_input(data: bytes) -> None:
    for look in (received, handed_over, weights_alone):
        try:
            look(data)
        except ModelError:
            continue


def received(data: bytes) -> None:
    """As from the network: checksums are compared, so that what comes out is what went in."""
    with ScaleoutModel.from_stream(io.BytesIO(data), limits=LIMITS) as model:
        model.verify()
        renamed = model.to_builder().set_model_id("renamed").build()
        assert renamed.model_id == "renamed"
        assert ScaleoutModel.from_stream(renamed.get_file_stream()).metadata == renamed.metadata
        if model.has_training_model and not model.legacy_source:
            for one, other in zip(flat(model), flat(renamed), strict=True):
                assert one.tobytes() == other.tobytes()


def flat(model: ScaleoutModel) -> list[np.ndarray]:
    weights = model.get_training_model()
    return weights if isinstance(weights, list) else [weights]


def handed_over(data: bytes) -> None:
    """Past the checksums, which libFuzzer does not guess: no trust depends on them."""
    container = Container(SealedMemory.of(data), trusted=True, limits=LIMITS)
    assert METADATA in container.entries
    for name in container.entries:
        content = container.content(name)
        assert len(content) == container.entries[name].size <= LIMIT
        weights_alone(bytes(content))


def weights_alone(data: bytes) -> None:
    for read in (
        lambda: read_arrays(memoryview(data), verify=False, limits=ARCHIVE_LIMITS),
        lambda: [decode_array(memoryview(data))],
    ):
        try:
            arrays = read()
        except ModelError:
            continue
        for array in arrays:
            assert not array.flags.writeable
            assert not array.dtype.hasobject
            array.tobytes()


def seeds() -> list[bytes]:
    """Return models of every kind."""
    arrays = [np.arange(20, dtype=np.float32).reshape(4, 5), np.asfortranarray(np.ones((2, 3))), np.array(1)]
    npz, compressed = io.BytesIO(), io.BytesIO()
    np.savez(npz, **{str(index): array for index, array in enumerate(arrays)})
    np.savez_compressed(compressed, **{str(index): array for index, array in enumerate(arrays)})
    released = io.BytesIO()
    with zipfile.ZipFile(released, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(METADATA, '{"model_id": "m", "helper_type": "numpyhelper", "version": 2}')
        with archive.open("training_model.bin", "w", force_zip64=True) as entry:
            entry.write(compressed.getvalue())
        archive.writestr("files/notes.txt", "x" * 500)
    npy = io.BytesIO()
    np.save(npy, np.zeros(3, [("a", "<f4"), ("b", "<i2", 2)]))
    built = [
        ScaleoutModel.from_training_model(arrays, metadata={"k": [1, {}]}, compression=compression)
        for compression in ("stored", "deflate")
    ]
    built.append(built[0].to_builder().set_inference_model(b"graph", "onnx").set_file("a", b"b").build())
    return [
        *(model.get_file_stream().read() for model in built),
        *(buffer.getvalue() for buffer in (npz, compressed, released, npy)),
    ]


def main() -> None:
    findings = os.path.join(os.environ.get("FUZZ_FINDINGS", tempfile.gettempdir()), "")
    with tempfile.TemporaryDirectory() as corpus:
        for index, seed in enumerate(seeds()):
            with open(os.path.join(corpus, str(index)), "wb") as file:
                file.write(seed)
        arguments = [
            sys.argv[0],
            f"-max_total_time={SECONDS}",
            "-timeout=10",
            "-max_len=65536",
            f"-artifact_prefix={findings}",
            # The interpreter with numpy and libFuzzer's own tables, and twice the limit.
            f"-rss_limit_mb={512 + 2 * (LIMIT >> 20)}",
        ]
        # libFuzzer leaves by _exit: the folder goes in a child's stead.
        pid = os.fork()
        if pid == 0:
            atheris.Setup([*arguments, *(sys.argv[1:] or [corpus])], one_input)
            atheris.Fuzz()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.exit(status)


if __name__ == "__main__":
    main()
