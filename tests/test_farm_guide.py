"""What docs/farm.md tells operators to type is what the commands take; what it runs on is not here to be tried."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml
from apache_beam.options.pipeline_options import PipelineOptions, WorkerOptions
from apache_beam.transforms.resources import resource_hints_from_options

from pipeline.options import parse
from pipeline.score_corpus import _parser

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "farm.md").read_text()


def parsed(flags: list[str]) -> PipelineOptions:
    return parse(_parser(has_scorer=False), flags)[1]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def manifest(kind: str) -> Any:
    (found,) = (each for block in blocks("yaml") for each in yaml.safe_load_all(block) if each["kind"] == kind)
    return found


def test_the_driver_on_kubernetes_has_flags_that_the_command_takes() -> None:
    (driver,) = manifest("Job")["spec"]["template"]["spec"]["containers"]
    cluster = manifest("FlinkDeployment")
    options = parsed(driver["args"]).get_all_options()
    assert driver["command"] == ["python", "-m", "pipeline.score_corpus"]
    assert options["flink_master"] == f"{cluster['metadata']['name']}-rest:8081"
    assert options["parallelism"] == cluster["spec"]["taskManager"]["replicas"]
    assert driver["image"] == cluster["spec"]["image"]


def test_dataflow_has_flags_that_the_command_takes() -> None:
    (block,) = (block for block in blocks("") if "DataflowRunner" in block)
    command = block.partition("-m pipeline.score_corpus ")[2]
    options = parsed(shlex.split(command.replace("\\\n", " ")))
    assert options.view_as(WorkerOptions).sdk_container_image.endswith("hardness:dataflow")
    assert len(resource_hints_from_options(options)) == 2  # Beam knows both


def test_scripts_and_policies_can_be_read() -> None:
    (slurm,) = (block for block in blocks("") if block.startswith("#!/bin/bash"))
    subprocess.run(["bash", "-n"], input=slurm, text=True, check=True)
    for policy in [*blocks("json"), *re.findall(r"<<'END'\n(.*?)^END", GUIDE, re.DOTALL | re.MULTILINE)]:
        json.loads(policy)


def test_versions_are_those_that_are_pinned() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    engines = (ROOT / "pipeline" / "engines" / "requirements.txt").read_text()
    (beam,) = re.findall(r"^ARG BEAM_VERSION=(.+)$", dockerfile, re.MULTILINE)
    (flink,) = re.findall(r"^ARG FLINK_VERSION=(.+)$", dockerfile, re.MULTILINE)
    assert f"apache-beam=={beam}\n" in constraints
    assert f"apache-beam[gcp]=={beam}'" in GUIDE
    assert f"apache-flink=={flink} " in engines
