"""Models on their way: shared, bounded, whole, and beside everything else; and whose signature they have."""

from __future__ import annotations

import asyncio
import logging
import os
import types

import edge_callbacks as callbacks
import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from edge_running import POLLING, RunningClient
from observing import open_descriptors, wait_until

from scaleout_mp import (
    ConfigError,
    EdgeClient,
    GrpcConnectionOptions,
    GrpcEdgeClientRuntime,
    ScaleoutModel,
    TrustedSigners,
)
from scaleout_mp.config import Settings
from scaleout_mp.errors import CallError, ModelFormatError, ModelSignatureError, ModelTransferError, TransportError
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import (
    HeartbeatReceived,
    ModelDownloaded,
    ModelUploaded,
    PollReceived,
    TaskReported,
    UpdateReceived,
)
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.calls import CombinerCalls
from scaleout_mp.transport.channel import CallCredentials, open_channel
from scaleout_mp.transport.patience import Patience
from scaleout_mp.transport.transfer import ModelTransfer
from scaleout_mp.wire import edge_pb2 as pb

MIB = 1 << 20


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


def add_model(net, size=100):
    with ScaleoutModel.from_training_model([np.zeros(size, np.float32)], compression="stored") as model:
        return net.add_model(model)


def end_of(net, task, timeout=20):
    task.done(timeout)
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end


def with_transfer(net, act, **options):
    """Run `act(transfer)` over a channel of its own and return what it returns."""

    async def main():
        host, port = net.combiner_address.split(":")
        calls = CombinerCalls(open_channel(host, int(port), secure=False), CallCredentials(client_id="c", name="n"))
        calls.backoff = Backoff(first=0.02)
        try:
            return await act(ModelTransfer(calls, **options))
        finally:
            await calls.aclose()

    return asyncio.run(main())


async def until_taken(net, method):
    """Wait until a planned fault has hit its call."""
    async with asyncio.timeout(10):
        while net.faults.planned(method):  # noqa: ASYNC110 - the plan belongs to another thread
            await asyncio.sleep(0.005)


def models_in_memory():
    """Return the inodes of the models that this process has open; tests before may have left some to a collection."""
    open_ones = [number for number, path in open_descriptors().items() if "memfd:scaleout" in path]
    return {os.fstat(number).st_ino for number in open_ones}


def test_who_wants_a_model_at_the_same_time_shares_one_download(net):
    model_id = add_model(net)
    net.faults.add("Download", Fault(delay=0.2))

    async def act(transfer):
        models = await asyncio.gather(*(transfer.download(model_id) for _ in range(5)))
        first = models.pop()
        assert {os.fstat(model.fileno()).st_ino for model in models} == {os.fstat(first.fileno()).st_ino}
        first.close()
        # Closing one takes nothing from the others.
        for model in models:
            assert model.model_id == model_id
            assert model.get_training_model()[0].sum() == 0
            model.close()
        # Who comes later does not get what was closed.
        (await transfer.download(model_id)).close()

    before = models_in_memory()
    with_transfer(net, act)
    assert len(net.events.of(ModelDownloaded)) == 2
    assert models_in_memory() - before == set()


def test_who_gives_up_does_not_take_the_download_from_the_others(net):
    model_id = add_model(net)
    net.faults.add("Download", Fault(delay=0.3))

    async def act(transfer):
        waiting = [asyncio.create_task(transfer.download(model_id)) for _ in range(3)]
        await until_taken(net, "Download")
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        for task in waiting[1:]:
            (await task).close()

    with_transfer(net, act)
    assert len(net.events.of(ModelDownloaded)) == 1


def test_a_download_that_nobody_wants_any_more_is_given_up(net):
    model_id = add_model(net)
    net.faults.add("Download", Fault(delay=30))

    async def act(transfer):
        waiting = [asyncio.create_task(transfer.download(model_id)) for _ in range(3)]
        await until_taken(net, "Download")
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert len(asyncio.all_tasks()) == 1
        (await transfer.download(model_id)).close()

    with_transfer(net, act)


def test_all_who_wait_hear_of_the_failure(net):
    async def act(transfer):
        outcomes = await asyncio.gather(*(transfer.download("none") for _ in range(3)), return_exceptions=True)
        assert {str(outcome) for outcome in outcomes} == {"the server does not have model none"}

    with_transfer(net, act)


def test_a_model_that_is_too_large_never_gets_in(net):
    model_id = add_model(net, MIB)

    async def act(transfer):
        with pytest.raises(ModelFormatError, match=r"larger than the 1,048,576 bytes that are allowed"):
            await transfer.download(model_id)

    with_transfer(net, act, max_size=MIB)
    settings = Settings(polling_interval=POLLING, send_telemetry=False, max_model_size=MIB)
    with RunningClient(net, settings=settings) as edge:
        edge.client.set_train_callback(callbacks.train)
        end = end_of(net, edge.issue(model_id=model_id))
        assert end_of(net, edge.issue(model_id=add_model(net))).status == "COMPLETED"
    assert end.status == "FAILED"
    assert "larger than" in end.response["error"]


def test_the_largest_size_is_read_from_the_environment():
    assert Settings.from_environ({"SCALEOUT_MP_MAX_MODEL_SIZE": "1000"}).max_model_size == 1000
    assert Settings.from_environ({"SCALEOUT_MP_MAX_MODEL_SIZE": "2GiB"}).max_model_size == 2 << 30
    for wrong in ("0", "much", "-1"):
        with pytest.raises(ConfigError, match="SCALEOUT_MP_MAX_MODEL_SIZE"):
            Settings.from_environ({"SCALEOUT_MP_MAX_MODEL_SIZE": wrong})


def test_what_a_broken_attempt_left_is_no_part_of_the_model(net):
    model_id = add_model(net, MIB)
    net.faults.add("Download", Fault(truncate=MIB))
    net.faults.add("Download", Fault(code=grpc.StatusCode.UNAUTHENTICATED))

    async def act(transfer):
        with pytest.raises(Exception, match="wants a token"):
            await transfer.download(model_id)
        with await transfer.download(model_id) as model:
            assert model.size > 4 * MIB

    with_transfer(net, act)


def test_an_upload_that_the_server_ends_at_once_fails_with_what_the_server_said(net):
    """gRPC has an internal error in its place, while parts are still being written."""
    net.faults.add("Upload", Fault(code=grpc.StatusCode.UNAVAILABLE, delay=0.05), times=4)

    async def act(transfer):
        with ScaleoutModel.from_training_model([np.zeros(6 * MIB, np.float32)], compression="stored") as model:
            await transfer.upload(model)
            net.faults.add("Upload", Fault(code=grpc.StatusCode.UNKNOWN), times=2)
            await transfer.upload(model)
            for code in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"):
                details = "CLIENT: Received message larger than max"
                net.faults.add("Upload", Fault(code=grpc.StatusCode[code], details=details, delay=0.05))
                with pytest.raises(CallError, match=code):
                    await transfer.upload(model)
            net.faults.add("Upload", Fault(code=grpc.StatusCode.INTERNAL), times=3)
            with pytest.raises(ModelTransferError, match="3 times: Upload: INTERNAL"):
                await transfer.upload(model)

    with_transfer(net, act)
    assert net.faults.planned("Upload") == 0


def test_a_transfer_that_gets_nowhere_is_begun_anew_and_holds_up_no_poll(net, caplog):
    """The server stops to read in the middle, takes all and never answers, gives a part and no more."""
    caplog.set_level(logging.DEBUG, "scaleout_mp.transport")
    net.faults.add("Upload", Fault(hang=1))
    net.faults.add("Upload", Fault(hang=1 << 40))

    async def act(transfer):
        with ScaleoutModel.from_training_model([np.zeros(6 * MIB, np.float32)], compression="stored") as model:
            upload = asyncio.create_task(transfer.upload(model))
            while not upload.done():
                await transfer._calls.poll(pb.ClientReport(client_id="c"), within=1)
                await asyncio.sleep(0.02)
            await upload
            net.faults.add("Download", Fault(hang=1))
            (await transfer.download(model.model_id)).close()

    with_transfer(net, act, patience=Patience(download=0.3, upload=0.6, answer=0.3, answer_per_gb=0))
    for said in ("takes nothing more for 1 s", "does not answer for 0 s", "no byte came for 0 s"):
        assert said in caplog.text
    assert net.faults.planned("Upload") == net.faults.planned("Download") == 0
    # What hung is one call of each try: nothing of it is taken for a model.
    assert [event.accepted for event in net.events.of(ModelUploaded)] == [True]


def test_a_download_that_the_server_fails_to_give_is_asked_for_again(net):
    model_id = add_model(net)
    net.faults.add("Download", Fault(code=grpc.StatusCode.UNKNOWN), times=2)

    async def act(transfer):
        (await transfer.download(model_id)).close()
        net.faults.add("Download", Fault(code=grpc.StatusCode.INTERNAL), times=3)
        with pytest.raises(ModelTransferError, match="3 times: Download: INTERNAL"):
            await transfer.download(model_id)

    with_transfer(net, act)


def test_tasks_that_come_together_with_one_model_load_it_once(net):
    model_id = add_model(net)
    net.faults.always("Download", Fault(delay=0.5))
    with RunningClient(net, max_concurrent_tasks=3) as edge:
        edge.client.set_train_callback(callbacks.train)
        edge.client.set_validate_callback(callbacks.validate)
        tasks = [
            edge.issue(kind, model_id=model_id)
            for kind in ("Scaleout_ModelUpdate", "Scaleout_Validation", "Scaleout_ModelUpdate")
        ]
        assert {end_of(net, task).status for task in tasks} == {"COMPLETED"}
    assert len(net.events.of(ModelDownloaded)) == 1
    assert len({update.model_update_id for update in net.events.of(UpdateReceived)}) == 2


def grows(model, settings):
    """Return a model of `settings["mib"]` MiB that does not compress."""
    weights = np.random.default_rng(1).integers(0, 256, settings["mib"] << 20, dtype=np.uint8)
    return (
        ScaleoutModel.from_training_model([weights], compression="stored"),
        {"training_metadata": {"num_examples": 1}},
    )


def test_how_far_an_upload_has_come_is_to_be_seen(net):
    net.faults.add("Upload", Fault(delay=1.0))
    with RunningClient(net) as edge:
        edge.client.set_train_callback(grows)
        task = edge.issue(model_id=add_model(net), settings={"mib": 16})

        def uploading():
            return next((one for one in edge.runtime.snapshot().tasks if one.moved is not None), None)

        # As much as gRPC takes while the server does not read.
        seen = wait_until(lambda: (one := uploading()) and one.to_move and one.moved and one, seconds=20)
        assert end_of(net, task).status == "COMPLETED"
        assert uploading() is None
    assert seen.phase == "uploading"
    assert 0 < seen.moved <= seen.to_move
    assert seen.to_move > 16 * MIB


def test_polls_and_heartbeats_are_on_time_beside_a_large_upload_and_download(net):
    with RunningClient(net, run={"with_heartbeat": True}, heartbeat_interval=0.2) as edge:
        edge.client.set_train_callback(grows)
        edge.client.set_validate_callback(callbacks.validate)
        # The network lives in this process and shares its interpreter lock, so this is on the strict side.
        end = end_of(net, edge.issue(model_id=add_model(net), settings={"mib": 256}), timeout=60)
        assert end.status == "COMPLETED"
        (update,) = net.events.of(UpdateReceived)
        assert end_of(net, edge.issue("Scaleout_Validation", model_id=update.model_update_id), 60).status == "COMPLETED"
    assert net.events.of(ModelUploaded)[0].size > 256 * MIB
    assert net.events.largest_gap(PollReceived, edge.id) < POLLING + 0.2
    assert net.events.largest_gap(HeartbeatReceived, edge.id) < 0.2 + 0.2


# Signatures


@pytest.fixture(scope="module")
def keys():
    alice, mallory = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    return types.SimpleNamespace(alice=alice, mallory=mallory, trusted={"alice": alice.public_key()})


def publish(net, *signatures):
    """Add a model with the signatures that `signatures` make of it; return its id."""
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=Settings()))
    client.connect_to_api(net.api_url, {"name": "owner"})
    with ScaleoutModel.from_training_model([np.zeros(10)]) as model:
        model_id = net.add_model(model)
        for sign in signatures:
            client.post_signature(sign(model))
    return model_id


def other_model_signed(key):
    with ScaleoutModel.from_training_model([np.ones(10)]) as other:
        return other.sign(key, "alice")


@pytest.mark.parametrize("policy", ["require", "warn", "off"])
@pytest.mark.parametrize(
    ("sign", "verifies"),
    [
        (lambda model, keys: model.sign(keys.alice, "alice"), True),
        (lambda model, keys: model.sign(keys.alice), True),
        (lambda model, keys: model.sign(keys.alice, "a name of her own"), True),
        (lambda model, keys: model.sign(keys.mallory, "alice"), False),
        (lambda model, keys: model.sign(keys.mallory), False),
        (lambda model, keys: {**other_model_signed(keys.alice), "model_id": model.model_id}, False),
        (lambda model, keys: {**model.sign(keys.alice), "algorithm": "none"}, False),
        (lambda model, keys: {**model.sign(keys.alice), "signature": "AAAA"}, False),
        (None, False),
    ],
)
def test_only_what_a_trusted_signer_signed_reaches_a_task(net, keys, policy, sign, verifies, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    ran = tmp_path / "ran"

    def validate(model):
        ran.touch()
        return {"accuracy": 1}

    model_id = publish(net, *([] if sign is None else [lambda model: sign(model, keys)]))
    signers = TrustedSigners(keys=keys.trusted, policy=policy)
    with RunningClient(net, trusted_signers=signers) as edge:
        edge.client.set_validate_callback(validate)
        end = end_of(net, edge.issue("Scaleout_Validation", model_id=model_id))
        passes = verifies or policy != "require"
        assert end.status == ("COMPLETED" if passes else "FAILED")
        assert ran.exists() is passes
        if not passes:
            assert f"model {model_id} has no signature" in end.response["error"]
            assert "trusted signers: alice" in end.response["error"]
            with pytest.raises(ModelSignatureError):
                edge.runtime.get_model_from_combiner(model_id)
    assert ("is signed by alice" in caplog.text) is (verifies and policy != "off")
    assert ("has no signature" in caplog.text) is (not verifies and policy != "off")


def test_a_required_signature_is_waited_for_while_the_api_is_away(net, keys):
    model_id = publish(net, lambda model: model.sign(keys.alice))
    net.faults.add("model-signatures", Fault(status=503), times=2)
    with RunningClient(net, trusted_signers=TrustedSigners(keys=keys.trusted)) as edge:
        edge.client.set_validate_callback(callbacks.validate)
        assert end_of(net, edge.issue("Scaleout_Validation", model_id=model_id)).status == "COMPLETED"


def test_a_wanted_signature_is_not(net, keys, caplog):
    model_id = publish(net, lambda model: model.sign(keys.alice))
    net.faults.add("model-signatures", Fault(status=503), times=100)
    with RunningClient(net, trusted_signers=TrustedSigners(keys=keys.trusted, policy="warn")) as edge:
        edge.client.set_validate_callback(callbacks.validate)
        assert end_of(net, edge.issue("Scaleout_Validation", model_id=model_id)).status == "COMPLETED"
    assert "cannot be found out" in caplog.text


def test_signatures_that_are_none_are_passed_over(keys):
    odd = [
        {"signer_id": []},
        {"signer_id": {}, "signature": 3},
        {"algorithm": [], "signature": "x"},
        {"signature": "="},
    ]
    with ScaleoutModel.from_training_model([np.zeros(3)]) as model:
        signers = TrustedSigners(keys=keys.trusted)
        assert signers.signer_of(model, odd) is None
        assert signers.signer_of(model, [*odd, model.sign(keys.alice)]) == "alice"


def test_a_signature_that_the_server_does_not_take_is_one_line(net):
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=Settings()))
    with pytest.raises(ConfigError, match="API's URL"):
        client.post_signature({})
    client.connect_to_api(net.api_url, {"name": "owner"})
    with pytest.raises(TransportError, match=r"did not take the signature .400: .*signature missing"):
        client.post_signature({"model_id": "m", "algorithm": "ed25519"})


def test_signers_are_read_from_a_folder(keys, tmp_path):
    with pytest.raises(ConfigError, match=r"no \.pem file"):
        TrustedSigners.from_folder(tmp_path)
    pem = keys.alice.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "alice.pem").write_bytes(pem)
    assert list(TrustedSigners.from_folder(tmp_path).keys) == ["alice"]
    env = {"SCALEOUT_MP_TRUSTED_SIGNERS": str(tmp_path), "SCALEOUT_MP_SIGNATURES": "warn"}
    assert GrpcEdgeClientRuntime(settings=Settings.from_environ(env))._connection.signers.policy == "warn"
    (tmp_path / "broken.pem").write_text("x")
    with pytest.raises(ConfigError, match=r"broken\.pem is no public key"):
        TrustedSigners.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "always"}, "one of"),
        ({"keys": {}}, "no key"),
        ({"keys": {"alice": "-----BEGIN"}}, "must be an Ed25519PublicKey, not str"),
    ],
)
def test_signers_that_make_no_sense_are_one_line(keys, options, says):
    with pytest.raises(ConfigError, match=says):
        TrustedSigners(**{"keys": keys.trusted, **options})


def test_a_policy_without_an_api_to_ask_ends_the_run_before_it_begins(net, keys):
    settings = Settings(check_version=False)
    runtime = GrpcEdgeClientRuntime(settings=settings, trusted_signers=TrustedSigners(keys=keys.trusted))
    client = EdgeClient(train_callback=callbacks.train, runtime=runtime)
    client.set_client_id("c")
    host, port = net.combiner_address.split(":")
    assert client.init_grpchandler(GrpcConnectionOptions(host, int(port), grpc_secure=False))
    with pytest.raises(ConfigError, match="API's URL"):
        client.run()
