"""The pure parts of the supervisor: the book of tasks, signals, messages, callbacks."""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scaleout_mp.client import EdgeClient
from scaleout_mp.config import Settings
from scaleout_mp.errors import ConfigError, NotConnectedError
from scaleout_mp.supervisor import GrpcEdgeClientRuntime, messages
from scaleout_mp.supervisor.blocking import run_blocking
from scaleout_mp.supervisor.callbacks import CallbackTable
from scaleout_mp.supervisor.connecting import assignment_payload
from scaleout_mp.supervisor.endings import JobFailedError, json_text
from scaleout_mp.supervisor.shutdown import SignalReader, StopAction
from scaleout_mp.supervisor.state import opened_state
from scaleout_mp.supervisor.taskbook import TaskBook, TaskStatus, Verdict
from scaleout_mp.task import (
    AttributesRecord,
    EndReason,
    ExitReport,
    LogLine,
    MetricRecord,
    RecordContext,
    TelemetryRecord,
)
from scaleout_mp.transport.outbox import MessageKind
from scaleout_mp.wire import edge_pb2 as pb


def request(correlation_id="c", status="", **fields):
    return pb.TaskRequest(correlation_id=correlation_id, status=status, **fields)


def reported(book):
    return {report.correlation_id: (report.status, report.done, report.response) for report in book.reports("me")}


class TestTaskBook:
    def test_a_task_from_delivery_to_acceptance(self):
        book = TaskBook()
        assert book.reports("me") == []
        assert book.receive(request()) is Verdict.START
        assert reported(book) == {"c": ("PENDING", False, "")}
        book.run("c")
        assert reported(book) == {"c": ("RUNNING", False, "")}
        before = book.reports("me")
        book.finish("c", TaskStatus.COMPLETED, "{}")
        # The end came after this report was made: it is not in it.
        book.accepted(before)
        assert reported(book) == {"c": ("COMPLETED", True, "{}")}
        assert book.reports("me")[0].node_id == "me"
        book.accepted(book.reports("me"))
        assert book.reports("me") == []

    def test_a_second_delivery_starts_nothing(self):
        book = TaskBook()
        book.receive(request())
        assert book.receive(request(status="PENDING")) is Verdict.NOTHING
        book.finish("c", TaskStatus.FAILED, "x")
        assert book.receive(request()) is Verdict.NOTHING
        book.accepted(book.reports("me"))
        # The server asks again after the end: it hears the same end again.
        assert book.receive(request()) is Verdict.NOTHING
        assert reported(book) == {"c": ("FAILED", True, "x")}

    @pytest.mark.parametrize(
        ("status", "verdict", "says"),
        [
            ("INTERRUPTED", Verdict.ABORT, "Aborted by server"),
            ("TIMEOUT", Verdict.TIME_OUT, "Timed out by server"),
        ],
    )
    def test_an_abort_reaches_what_runs_and_answers_for_what_does_not(self, status, verdict, says):
        book = TaskBook()
        book.receive(request())
        assert book.receive(request(status=status)) is verdict
        book.finish("c", TaskStatus.COMPLETED, "")
        assert book.receive(request(status=status)) is Verdict.NOTHING
        book.accepted(book.reports("me"))
        for correlation_id in ("c", "never seen"):
            assert book.receive(request(correlation_id, status)) is Verdict.NOTHING
        # What had ended before the abort came has one end, and that is told again.
        unknown = ("INTERRUPTED", True, json.dumps({"msg": says}))
        assert reported(book) == {"c": ("COMPLETED", True, ""), "never seen": unknown}
        book.accepted(book.reports("me"))
        assert book.receive(request("never seen")) is Verdict.NOTHING

    def test_ends_that_do_not_fit_into_one_report_ride_in_the_next(self):
        book = TaskBook()
        responses = {name: json.dumps(name * (1 << 20)) for name in "abc"} | {"d": '"d"'}
        for name, response in responses.items():
            book.receive(request(name))
            book.run(name)
            book.finish(name, TaskStatus.COMPLETED, response)
        told = {}
        while book.unreported:
            reports = book.reports("me")
            assert pb.ClientReport(reports=reports).ByteSize() < (2 << 20) + 4096
            # What must wait is still held, and not missing.
            assert {report.correlation_id for report in reports} == set(responses) - set(told)
            assert {report.status for report in reports if not report.done} <= {"RUNNING"}
            told |= {report.correlation_id: report.response for report in reports if report.done}
            book.accepted(reports)
        assert told == responses
        # A long response is not kept for ever.
        book.receive(request("a"))
        assert "too long to be kept" in book.reports("me")[0].response

    def test_a_task_ends_once(self):
        book = TaskBook()
        book.receive(request())
        book.finish("c", TaskStatus.COMPLETED, "")
        with pytest.raises(RuntimeError, match="COMPLETED"):
            book.finish("c", TaskStatus.FAILED, "")

    def test_only_so_many_finished_tasks_are_remembered(self):
        book = TaskBook(remembered=2)
        for correlation_id in "abc":
            book.receive(request(correlation_id))
            book.finish(correlation_id, TaskStatus.COMPLETED, "")
            book.accepted(book.reports("me"))
        assert book.receive(request("c")) is Verdict.NOTHING
        assert book.receive(request("a")) is Verdict.START


class BookMachine(RuleBasedStateMachine):
    """Whatever the server sends and however its answers get lost, a task starts once and its end is reported."""

    ids = st.sampled_from("abcd")

    def __init__(self):
        super().__init__()
        self.book = TaskBook()
        self.started = set()
        self.open = set()
        self.on_the_way = []

    @rule(correlation_id=ids, status=st.sampled_from(["", "PENDING", "INTERRUPTED", "TIMEOUT"]))
    def receive(self, correlation_id, status):
        verdict = self.book.receive(request(correlation_id, status))
        if verdict is Verdict.START:
            assert correlation_id not in self.started
            assert status not in {"INTERRUPTED", "TIMEOUT"}
            self.started.add(correlation_id)
            self.open.add(correlation_id)
        elif verdict is not Verdict.NOTHING:
            assert correlation_id in self.open

    @rule(correlation_id=ids)
    def finish(self, correlation_id):
        if correlation_id in self.open:
            self.open.remove(correlation_id)
            self.book.finish(correlation_id, TaskStatus.COMPLETED, "")

    @rule()
    def poll_begins(self):
        self.on_the_way = self.book.reports("me")

    @rule(arrives=st.booleans())
    def poll_ends(self, arrives):
        if arrives:
            self.book.accepted(self.on_the_way)
        self.on_the_way = []

    @invariant()
    def what_runs_is_reported_as_such(self):
        held = {report.correlation_id for report in self.book.reports("me") if not report.done}
        assert held == self.open
        assert self.book.unfinished == len(self.open)


TestBookMachine = BookMachine.TestCase
TestBookMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class TestSignals:
    def test_ctrl_c_aborts_first_and_ends_within_five_seconds(self):
        reader = SignalReader()
        assert reader.interrupt(10.0, tasks=1) is StopAction.ABORT_TASKS
        assert reader.interrupt(14.9, tasks=1) is StopAction.END
        assert reader.interrupt(15.0, tasks=1) is StopAction.END_NOW

    def test_a_late_second_ctrl_c_is_a_first_one_again(self):
        reader = SignalReader()
        reader.interrupt(10.0, tasks=1)
        assert reader.interrupt(15.1, tasks=1) is StopAction.ABORT_TASKS
        assert not reader.ending

    def test_ctrl_c_with_nothing_running_ends(self):
        assert SignalReader().interrupt(1.0, tasks=0) is StopAction.END

    def test_sigterm_ends_and_a_second_one_ends_at_once(self):
        reader = SignalReader()
        assert reader.terminate() is StopAction.END
        assert reader.ending
        assert reader.terminate() is StopAction.END_NOW


class TestMessages:
    task = request(model_id="m", round_id="r", session_id="s")

    def test_metrics_take_their_ids_from_the_task_unless_they_name_them(self):
        context = RecordContext(model_id="own", round_id=None, session_id="")
        # A context is whole, as with the published client: what it leaves out is not filled in.
        record = MetricRecord(metrics={"loss": 0.5}, step=3, timestamp=1.5, context=context)
        kind, message = messages.record_message("me", record, messages.Moments(), task=self.task)
        assert kind is MessageKind.METRIC
        assert (message.model_id, message.round_id, message.session_id) == ("own", "", "")
        kind, message = messages.record_message(
            "me", MetricRecord(metrics={}, step=3, timestamp=1.5), messages.Moments(), task=self.task
        )
        assert (message.model_id, message.round_id, message.session_id) == ("m", "r", "s")
        _, message = messages.record_message("me", record, messages.Moments(), task=self.task)
        assert message.step.value == 3
        assert message.timestamp.ToNanoseconds() == 1_500_000_000
        assert [(elem.key, elem.value) for elem in message.metrics] == [("loss", 0.5)]

    def test_no_step_is_no_step(self):
        record = MetricRecord(metrics={}, step=None, timestamp=0.0)
        _, message = messages.record_message("me", record, messages.Moments(), task=self.task)
        assert not message.HasField("step")
        assert message.model_id == "m"

    def test_the_other_records(self):
        kind, message = messages.record_message(
            "me", AttributesRecord(attributes={"a": "1"}, timestamp=0.0), messages.Moments()
        )
        assert (kind, message.attributes[0].key, message.client_id) == (MessageKind.ATTRIBUTES, "a", "me")
        kind, message = messages.record_message(
            "me", TelemetryRecord(telemetry={"t": 2.0}, timestamp=0.0), messages.Moments()
        )
        assert (kind, message.telemetries[0].value) == (MessageKind.TELEMETRY, 2.0)
        assert (
            messages.record_message("me", LogLine(logger="x", level=20, message="m", timestamp=0.0), messages.Moments())
            is None
        )

    def test_task_data(self):
        assert messages.task_data(request(), "parameters") == {}
        assert messages.task_data(request(data='{"parameters": {"a": 1}}'), "parameters") == {"a": 1}
        assert messages.task_data(request(data='{"other": 1}'), "parameters") == {}
        for bad in ("{", "[1]", '{"parameters": 3}'):
            with pytest.raises(ConfigError, match="the server sent task data"):
                messages.task_data(request(data=bad), "parameters")

    def test_a_failure_is_one_line_with_a_compact_report(self):
        report = ExitReport(
            task_id="t",
            name="n",
            reason=EndReason.MEMORY_LIMIT,
            message="passed its limit",
            memory_limit=10,
            peak_memory=12,
            traceback="\n".join(map(str, range(100))),
            stdout_tail="x" * 10_000,
        )
        response = messages.failure_response("one\n line", reason="memory_limit", report=report)
        assert response["error"] == "one line"
        assert response["reason"] == "memory_limit"
        sent = response["report"]
        assert (sent["memory_limit"], sent["peak_memory"], len(sent["stdout_tail"])) == (10, 12, 2_000)
        assert sent["traceback"].splitlines() == [str(n) for n in range(80, 100)]
        assert "exit_code" not in sent
        json.dumps(response)

    def test_a_failure_with_endless_texts_stays_small(self):
        report = ExitReport(task_id="t", name="n", reason=EndReason.FAILED, message="x" * 10**6, traceback="y" * 10**6)
        response = messages.failure_response("z" * 10**6, reason="failed", report=report)
        assert len(json.dumps(response)) < 50_000

    def test_what_a_child_sends_is_bounded_and_json(self):
        assert json_text({"a": 1}, "metrics") == '{"a": 1}'
        for bad, says in (("x" * (1 << 20), "at most 1048576"), (float("nan"), "cannot carry"), ({1}, "cannot carry")):
            with pytest.raises(JobFailedError, match=says) as caught:
                json_text(bad, "a result")
            assert "\n" not in str(caught.value)

    def test_status_types(self):
        assert messages.status_type("Scaleout_ModelUpdate") == "MODEL_UPDATE"
        assert messages.status_type("Scaleout_Validation") == "MODEL_VALIDATION"
        assert messages.status_type("Custom_x") == "Custom_x"


class TestCallbacks:
    def test_each_callback_is_prepared_once_until_it_changes(self):
        client = EdgeClient(train_callback=print)
        client.set_custom_callback("x", repr)
        prepared, threads = [], {threading.main_thread(): 0, "another": 0}

        def prepare(call):
            here = threading.current_thread()
            threads[here if here in threads else "another"] += 1
            prepared.append(call.callback)
            return len(prepared)

        table = CallbackTable(client, prepare)
        table.prepare_all()
        assert prepared == [print, repr]
        assert asyncio.run(table.prepared("Scaleout_ModelUpdate")) == 1
        client.set_train_callback(len)
        assert asyncio.run(table.prepared("Scaleout_ModelUpdate")) == 3
        assert threads == {threading.main_thread(): 2, "another": 1}
        assert table.name("Scaleout_ModelUpdate") == "Scaleout_ModelUpdate (builtins.len)"

    @pytest.mark.parametrize(
        ("task_type", "says"),
        [
            ("Scaleout_ModelUpdate", "no train callback"),
            ("Scaleout_Validation", "no validate callback"),
            ("Custom_x", "no custom callback for Custom_x"),
            ("Scaleout_Dance", "does not know tasks of type 'Scaleout_Dance'"),
        ],
    )
    def test_what_no_callback_serves_says_so(self, task_type, says):
        table = CallbackTable(EdgeClient(), lambda call: call)
        with pytest.raises(ConfigError, match=says):
            asyncio.run(table.prepared(task_type))
        with pytest.raises(ConfigError, match="no callback registered"):
            table.require_any()


class TestRuntime:
    def test_the_payload_is_filled_in_and_the_users_dict_left_alone(self):
        client = EdgeClient()
        client.set_client_id("i")
        given = {"name": "n", "client_id": None, "extra": 1}
        payload = assignment_payload(client, given, Settings(client_version="9"))
        assert payload == {
            "name": "n",
            "client_id": "i",
            "preferred_combiner": None,
            "package": "local",
            "client_version": "9",
            "extra": 1,
        }
        assert given == {"name": "n", "client_id": None, "extra": 1}
        assert "client_version" not in assignment_payload(client, None, Settings(check_version=False))
        assert assignment_payload(EdgeClient(), None, Settings())["client_id"]

    @pytest.mark.parametrize("answer", ["gave up after 5 tries: SECRET", None, {"host": "h"}])
    def test_what_came_instead_of_options_is_not_taken_for_some(self, answer):
        client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=Settings()))
        with pytest.raises(ConfigError, match="look at its result first") as caught:
            client.init_grpchandler(answer)
        assert "SECRET" not in str(caught.value)

    def test_logging_and_running_before_connecting(self, caplog):
        runtime = GrpcEdgeClientRuntime(settings=Settings())
        client = EdgeClient(runtime=runtime)
        assert runtime.client is client
        assert client.log_attributes({"a": 1}) is False
        assert "not connected" in caplog.text
        with pytest.raises(NotConnectedError, match="init_grpchandler"):
            client.run()
        with pytest.raises(NotConnectedError):
            runtime.get_model_from_combiner("m")
        runtime.stop()
        assert runtime.abort_task("c") is False
        assert runtime.snapshot().tasks == ()
        assert client.get_access_token() is None

    def test_wrong_arguments_and_a_missing_client(self):
        wrong = {
            "heartbeat_interval": (0, "soon", None, [], math.nan, math.inf, True),
            "goodbye_seconds": (-1, "soon", None, math.nan, math.inf),
            "max_concurrent_tasks": (0, "3", 1.5, True),
            "start_method": ("fork",),
        }
        for name, values in wrong.items():
            for value in values:
                with pytest.raises(ConfigError, match=name):
                    GrpcEdgeClientRuntime(settings=Settings(), **{name: value})
        with pytest.raises(ConfigError, match="no client"):
            GrpcEdgeClientRuntime(settings=Settings()).send_attributes({})


def test_what_a_client_keeps_is_for_its_user_alone_also_where_it_was_not(tmp_path):
    before = os.umask(0)
    try:
        for _ in range(2):
            with opened_state("c", "http://h", root=str(tmp_path)) as state:
                modes = {stat.S_IMODE(path.stat().st_mode) for path in (Path(state.path), Path(state.path, "results"))}
            assert modes == {0o700}
            Path(state.path).chmod(0o755)
    finally:
        os.umask(before)


class TestOwnTasks:
    OWN = pb.TaskRequest(correlation_id="o", type="Autonomous_look", data='{"a": 1}')

    def introduced(self, book):
        (report,) = book.reports("me")
        return report.HasField("command_type") and (report.command_type, report.parameters)

    def test_it_is_introduced_until_the_server_names_it(self):
        book = TaskBook()
        book.start(self.OWN)
        assert self.introduced(book) == ("Autonomous_look", '{"a": 1}')
        book.accepted(book.reports("me"))
        assert self.introduced(book)
        assert book.receive(request("o")) is Verdict.NOTHING
        assert not self.introduced(book)
        assert book.receive(request("o", "INTERRUPTED")) is Verdict.ABORT

    def test_it_is_introduced_ten_times_at_most_and_reports_that_got_lost_do_not_count(self, caplog):
        book = TaskBook()
        book.start(self.OWN)
        for _ in range(30):
            book.reports("me")
        for _ in range(10):
            assert self.introduced(book)
            book.accepted(book.reports("me"))
        assert not self.introduced(book)
        assert caplog.text.count("does not take notice of task o") == 1

    def test_its_end_is_introduced_as_well_also_by_the_next_start(self):
        book = TaskBook()
        book.restore(self.OWN, TaskStatus.COMPLETED, "{}")
        assert self.introduced(book) == ("Autonomous_look", '{"a": 1}')
        book.accepted(book.reports("me"))
        assert book.reports("me") == []
        book.start(request("given", type="Scaleout_Validation"))
        assert not self.introduced(book)

    def test_reports_say_when_it_began_and_ended(self):
        book = TaskBook(clock=iter([10.0, 12.5]).__next__)
        book.receive(request())
        assert not book.reports("me")[0].HasField("started_at")
        book.run("c")
        book.finish("c", TaskStatus.COMPLETED, "")
        (report,) = book.reports("me")
        assert (report.started_at.seconds, report.completed_at.ToNanoseconds()) == (10, 12_500_000_000)


class TestBlocking:
    def test_it_runs_where_no_loop_runs_and_where_one_does(self):
        async def answer():
            return threading.current_thread()

        async def notebook_cell():
            return run_blocking(answer)

        assert run_blocking(answer) is threading.current_thread()
        assert asyncio.run(notebook_cell()) is not threading.current_thread()

    def test_what_is_raised_in_the_other_thread_is_raised_here(self):
        async def fails():
            raise ConfigError("no")

        async def notebook_cell():
            run_blocking(fails)

        with pytest.raises(ConfigError, match="no"):
            asyncio.run(notebook_cell())
