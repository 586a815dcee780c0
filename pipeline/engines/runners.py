"""What Beam's runners for clusters leave open: which cluster, how many at a time, how a machine starts our harness."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    SparkRunnerOptions,
    StandardOptions,
)

from pipeline.engines import harness, local_flink
from pipeline.engines.flink_rest import Flink, NoAnswerError, Slots
from pipeline.engines.installation import job_server, require_java
from pipeline.engines.leash import JAVA_COMMAND
from pipeline.engines.placement import Placement
from scorer.errors import ConfigurationError

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 60.0
_BEAMS_SPARK_MASTER = "local[4]"
"""Beam's default, with which a worker that is killed ends the job: Spark tries nothing again."""
_SPARK_ATTEMPTS = 4


def place(options: PipelineOptions, folder: str) -> Placement | None:
    """Fills in what the runner needs and the user left open, for a folder of shards; None where there is no cluster.

    Raises:
        ConfigurationError: there is no cluster, or it has no slots.
    """
    runner = options.view_as(StandardOptions).runner
    if runner not in ("FlinkRunner", "SparkRunner"):
        return None
    logging.getLogger("apache_beam.utils.subprocess_server").setLevel(logging.ERROR)  # warns of each start and end
    cloud = options.view_as(GoogleCloudOptions)  # where Beam keeps the name of any runner's job
    cloud.job_name = cloud.job_name or f"hardness-{uuid.uuid4().hex[:12]}"
    _use_our_harness(options, {harness.FOLDER_VARIABLE: folder, harness.JOB_VARIABLE: cloud.job_name})
    if runner == "FlinkRunner":
        return Placement(runner, cloud.job_name, _place_on_flink(options))
    _place_on_spark(options)
    return Placement(runner, cloud.job_name, page=None)


def _use_our_harness(options: PipelineOptions, environment: Mapping[str, str]) -> None:
    """Has machines start `hardness-harness`, unless the user says how they start one."""
    portable = options.view_as(PortableOptions)
    if portable.environment_type is None:
        portable.environment_type = "PROCESS"
        portable.environment_config = json.dumps({"command": _our_command(harness.COMMAND), "env": environment})


def _use_job_server_of_ours(options: PipelineOptions) -> None:
    """Has Java end with the driver: a job server that outlives a killed one would go on, Spark's with the whole job."""
    require_java()
    server = options.view_as(JobServerOptions)
    if server.job_server_java_launcher == "java":
        server.job_server_java_launcher = _our_command(JAVA_COMMAND)


def _our_command(name: str) -> str:
    command = Path(sys.executable).with_name(name)
    if not command.exists():
        raise ConfigurationError(f"{command} is missing: install this project there (`pip install -e .`)")
    return str(command)


def _place_on_flink(options: PipelineOptions) -> str | None:
    """The cluster of `--flink_master` or `--job_endpoint`, else the one of `make flink-up`; gives its address."""
    portable, flink = options.view_as(PortableOptions), options.view_as(FlinkRunnerOptions)
    master = None if flink.flink_master in ("[auto]", "[local]") else flink.flink_master
    if master is None and portable.job_endpoint is None:
        cluster = local_flink.find(local_flink.cluster_folder())
        if cluster is None:
            raise ConfigurationError(
                "no Flink cluster: `make flink-up` starts one on this machine; for another one, FLINK_MASTER=host:port "
                "(--flink_master, its JobManager's page)"
            )
        master, portable.job_endpoint = cluster.rest, cluster.job_endpoint
    if portable.job_endpoint is None:
        _use_job_server_of_ours(options)
        flink.flink_job_server_jar = flink.flink_job_server_jar or str(job_server("flink"))
    if master is None:
        logger.warning("Ctrl-C will not end the job on Flink: --flink_master, its page, says where it could be ended")
        return None
    slots = _await_slots(Flink(master))
    if flink.parallelism < 1:
        flink.parallelism = slots.total
    logger.info("Flink at %s: %d TaskManagers, %d slots", master, slots.taskmanagers, slots.total)
    return str(master)


def _await_slots(flink: Flink) -> Slots:
    """Waits a while: JobManager and TaskManagers may have been started just before the driver."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    is_told = False
    while True:
        try:
            slots = flink.slots()
            reason = f"the Flink cluster at {flink.url} has no slots: is a TaskManager running?"
        except NoAnswerError as error:
            slots, reason = Slots(0, 0, 0), f"{error}. Expected --flink_master to be the host:port of its page"
        if slots.total:
            return slots
        if time.monotonic() > deadline:
            raise ConfigurationError(reason)
        if not is_told:
            logger.info("waiting for Flink at %s", flink.url)
        is_told = True
        time.sleep(1.0)


def _place_on_spark(options: PipelineOptions) -> None:
    """The master of `--spark_master_url`, by default this machine, a task a core."""
    portable, spark = options.view_as(PortableOptions), options.view_as(SparkRunnerOptions)
    if portable.job_endpoint is None:
        _use_job_server_of_ours(options)
        spark.spark_job_server_jar = spark.spark_job_server_jar or str(job_server("spark"))
    if spark.spark_master_url == _BEAMS_SPARK_MASTER:
        spark.spark_master_url = f"local[{len(os.sched_getaffinity(0))},{_SPARK_ATTEMPTS}]"
    logger.info("Spark at %s", spark.spark_master_url)
