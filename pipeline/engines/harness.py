"""`hardness-harness`: what an engine starts on a machine of its cluster to run our part of a job.

Beam calls this the `PROCESS` environment. The engine tells the address of its provision service, and that has all the
rest. Two processes come of it: the parent only watches, the child is Beam's own Python harness.

    engine ──starts──▶ parent ──starts, watches──▶ Beam's harness ──▶ supervisor ──▶ worker (tokenizer, ALM, device)

A harness that hangs or is stopped would keep its slot for ever, since no engine asks it for a sign of life; the parent
kills it, and the engine begins its splits again. Whichever of them dies, those behind it end as well; and all of them
when the job is over, since a harness that its engine forgot would keep its device.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from pipeline.engines.leash import LOOK_SECONDS, hold
from pipeline.engines.placement import is_current
from scorer.console import log_to_stderr

logger = logging.getLogger(__name__)

COMMAND = "hardness-harness"
_MODULE = "pipeline.engines.harness"
SILENT_VARIABLE = "HARDNESS_HARNESS_SILENT_SECONDS"
"""Seconds without a sign of life after which a harness is killed."""
_DEFAULT_SILENT_SECONDS = 120.0
_BEAT_SECONDS = 1.0
FOLDER_VARIABLE, JOB_VARIABLE = "HARDNESS_SHARDS", "HARDNESS_JOB"
"""Set by the driver: the folder of the shards, and the name under which the engine runs the job."""
_ASK_SECONDS = 2.0
_UNWANTED_SECONDS = 10.0
"""After the end of a job, in which its engine may end the harness itself; after a failover it was seen not to."""
_PROVISION_SECONDS = 60.0
_PULSE_VARIABLE = "HARDNESS_HARNESS_PULSE"


def main() -> None:
    """The command, with the flags that the engine gives it; as a child of its own, Beam's harness."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Started by Flink or Spark, not by people.")
    parser.add_argument("--id", required=True, help="of this worker, as the engine calls it")
    parser.add_argument("--provision_endpoint", required=True, help="HOST:PORT of the service that has all the rest")
    flags, _ = parser.parse_known_args()
    log_to_stderr()
    if _PULSE_VARIABLE in os.environ:
        _serve(int(os.environ.pop(_PULSE_VARIABLE)), flags.id, flags.provision_endpoint)
    else:
        sys.exit(_watch(sys.argv[1:]))


# --- The parent, which imports next to nothing


def _watch(flags: Sequence[str]) -> int:
    """Runs Beam's harness until it ends, hangs, or is not wanted any more; gives its exit code."""
    reading, writing = os.pipe()
    environment = {**os.environ, _PULSE_VARIABLE: str(writing)}
    return hold([sys.executable, "-m", _MODULE, *flags], environment, [writing], _Vigil(reading))


class _Vigil:
    """Looks after a harness: has it a pulse, and a job?"""

    def __init__(self, pulse: int):
        self._pulse = pulse
        self._longest = float(os.environ.get(SILENT_VARIABLE, _DEFAULT_SILENT_SECONDS))
        self._folder, self._job = os.environ.get(FOLDER_VARIABLE), os.environ.get(JOB_VARIABLE)
        self._beat = self._asked = self._wanted = time.monotonic()

    def __call__(self, child: subprocess.Popen[bytes]) -> int | None:
        """One look; gives an exit code where it has ended, or is to end."""
        is_heard = bool(select.select([self._pulse], [], [], LOOK_SECONDS)[0])
        now = time.monotonic()
        if is_heard:
            if not os.read(self._pulse, 4096):
                return child.wait()
            self._beat = now
        elif now - self._beat > self._longest:
            logger.error("the harness %d has not been heard of for %.0f s: it is killed", child.pid, self._longest)
            child.kill()
            return 1
        if now - self._asked > _ASK_SECONDS:
            self._asked = now
            if self._folder is None or self._job is None or is_current(self._folder, self._job):
                self._wanted = now
            elif now - self._wanted > _UNWANTED_SECONDS:
                logger.warning("the job %s is over, and its engine has forgotten this harness: it ends", self._job)
                return 0
        return None


# --- The child


def _serve(pulse: int, worker: str, endpoint: str) -> None:
    """Beam's harness, with a pulse."""
    threading.Thread(target=_beat, args=[pulse], name="pulse", daemon=True).start()
    from apache_beam.runners.worker import sdk_worker_main  # noqa: PLC0415 - seconds, in which the heart beats already

    os.environ |= _provision(worker, endpoint)
    sdk_worker_main.main(sys.argv)


def _beat(pulse: int) -> None:
    with suppress(OSError):
        while True:
            os.write(pulse, b".")
            time.sleep(_BEAT_SECONDS)
    os._exit(1)  # nobody watches any more


def _provision(worker: str, endpoint: str) -> dict[str, str]:
    """Asks the engine for everything else; gives the variables that Beam's harness reads."""
    import grpc  # noqa: PLC0415 - not in the parent, as the rest
    from apache_beam.portability.api import (  # noqa: PLC0415
        beam_provision_api_pb2,
        beam_provision_api_pb2_grpc,
        endpoints_pb2,
    )
    from google.protobuf import json_format, text_format  # noqa: PLC0415

    with grpc.insecure_channel(endpoint) as channel:
        stub = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        info = stub.GetProvisionInfo(
            beam_provision_api_pb2.GetProvisionInfoRequest(),
            metadata=[("worker_id", worker)],
            timeout=_PROVISION_SECONDS,
            wait_for_ready=True,
        ).info
    variables = {
        "WORKER_ID": worker,
        "PIPELINE_OPTIONS": json.dumps(json_format.MessageToDict(info.pipeline_options)),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
    }
    endpoints = {"CONTROL": info.control_endpoint, "LOGGING": info.logging_endpoint, "STATUS": info.status_endpoint}
    for name, descriptor in endpoints.items():
        if descriptor.url:
            described = text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=descriptor.url))
            variables[f"{name}_API_SERVICE_DESCRIPTOR"] = described
    return variables


if __name__ == "__main__":
    main()
