"""What a driver makes of a job that fails on Flink: an error of ours, as soon as there is one."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from benchmarks.small_job import wait_until
from pipeline.engines import watching
from pipeline.engines.flink_rest import Flink, FlinkJob, NoAnswerError
from pipeline.engines.placement import ENGINE_NAME, Placement, watched
from pipeline.engines.watching import Watch, find_error, root_cause
from scorer.errors import HardnessError, StorageError, WorkerError

PLACEMENT = Placement("FlinkRunner", "hardness-1", "localhost:9")
HARNESS_GONE = """\
org.apache.flink.runtime.JobException: Recovery is suppressed
\tat org.apache.flink.runtime.Handler.handle(Handler.java:139)
Caused by: java.lang.IllegalStateException: Process died with exit code 1
\tat org.apache.beam.ProcessManager.start(ProcessManager.java:72)
\t... 22 more
"""
DISK_FULL = r"""
java.lang.RuntimeException: Error received from SDK harness for instruction 3: Traceback (most recent call last):
  File "pipeline/supervision.py", line 9, in _listen
    raise error
scorer.errors.StorageError: /s/shard-1 cannot be written: No space left on device [while running 'Make']
\tat org.apache.beam.FnApiControlClient.handle(FnApiControlClient.java:157)
"""


class FakeFlink:
    """A JobManager with one job that fails again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failures: str, is_there: bool = True):
        self.job = FlinkJob("1", PLACEMENT.job, "RUNNING")
        self.canceled = 0
        monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.01)
        monkeypatch.setattr(Flink, "find", self._find if is_there else self._no_answer)
        monkeypatch.setattr(Flink, "failures", lambda *_: list(failures))
        monkeypatch.setattr(Flink, "cancel", self._cancel)

    def _find(self, _: str) -> FlinkJob:
        return self.job

    def _no_answer(self, _: str) -> FlinkJob:
        raise NoAnswerError("nobody there")

    def _cancel(self, _: FlinkJob) -> bool:
        self.canceled += 1
        return True


def test_an_error_of_ours_ends_the_job_at_its_first_occurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    flink = FakeFlink(monkeypatch, DISK_FULL)
    with Watch(PLACEMENT).looking() as watch:
        assert wait_until(lambda: flink.canceled == 1)
    error = watch.explain(RuntimeError("failed in state CANCELLED"))
    assert isinstance(error, StorageError)
    assert str(error) == "/s/shard-1 cannot be written: No space left on device"


def test_what_another_attempt_may_mend_is_left_to_flink(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flink = FakeFlink(monkeypatch, HARNESS_GONE, "scorer.errors.WorkerError: worker processes end while they start")
    with caplog.at_level("WARNING"), Watch(PLACEMENT).looking():
        assert wait_until(lambda: len(caplog.records) == 2)
    assert flink.canceled == 0
    assert "IllegalStateException: Process died with exit code 1" in caplog.text


@pytest.mark.parametrize(
    ("error", "is_there", "message"),
    [
        (grpc.RpcError("Socket closed"), True, "job server has died.*make flink-up.*run the same command again"),
        (RuntimeError("Connection refused"), False, "JobManager at .*localhost:9 has died.*make flink-up"),
        (RuntimeError("failed"), True, "the job is RUNNING on Flink: IllegalStateException: Process died.*overview"),
    ],
)
def test_the_message_says_what_has_died(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_there: bool, message: str
) -> None:
    FakeFlink(monkeypatch, HARNESS_GONE, is_there=is_there)
    with pytest.raises(WorkerError, match=message):
        raise Watch(PLACEMENT).explain(error) or error


def test_a_bug_keeps_its_traceback() -> None:
    bug = RuntimeError("java.lang.Exception: Traceback (most recent call last):\nKeyError: 3")
    assert Watch(PLACEMENT).explain(bug) is None
    assert Watch(None).explain(grpc.RpcError("no engine")) is None


def test_of_nested_causes_the_last_one_is_told() -> None:
    assert root_cause(HARNESS_GONE) == "IllegalStateException: Process died with exit code 1"
    assert find_error(HARNESS_GONE) is None


def fails() -> None:
    raise HardnessError("something else")


def test_a_job_that_could_not_be_ended_is_ended_by_the_next_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeFlink(monkeypatch, is_there=False)
    with pytest.raises(HardnessError, match="something else"), watched(str(tmp_path), PLACEMENT):
        fails()
    assert (tmp_path / ENGINE_NAME).exists()
    flink = FakeFlink(monkeypatch)
    with watched(str(tmp_path), None):  # on this machine alone
        assert flink.canceled == 1
    assert not (tmp_path / ENGINE_NAME).exists()
