"""What README.md shows works as it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scorer.shards import ShardReader
from trainer.masking import HardnessCollator

ROOT = Path(__file__).parents[1]

REPORT = """
import json
batches = [{name: values.tolist() for name, values in batch.items()} for batch in loader]
print(json.dumps({"law": law.tolist(), "batches": batches}))
"""


def test_python_snippet_streams_masked_batches_of_every_block_in_order(hardness_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, without network, in a folder whose `runs/shards` are real shards."""
    pytest.importorskip("datasets")
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shards = tmp_path / "runs" / "shards"
    shards.mkdir(parents=True)
    paths = [shards / f"shard-{index:05d}-of-00042.parquet" for index in range(3)]
    for source, path in zip(sorted(hardness_folder.glob("*.parquet")), paths, strict=True):
        shutil.copy(source, path)
    done = subprocess.run(
        [sys.executable, "-c", snippet + REPORT],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    first = pq.read_table(paths[0])
    scores = [np.array(first[name].to_pylist()) for name in ("forward_perplexity", "backward_perplexity")]
    hardness = (scores[0] + scores[1]) / (scores[0] + scores[1]).sum(axis=1, keepdims=True)
    weights = np.where(hardness > 0, hardness + 0.001, 0)
    np.testing.assert_allclose(found["law"], weights / weights.sum(axis=1, keepdims=True), rtol=1e-6)

    rows = pa.concat_tables([pq.read_table(path) for path in paths]).to_pylist()
    with ShardReader(str(paths[0])) as shard:
        collator = HardnessCollator(shard.metadata.vocabulary, alpha=0.001, seed=1)
    expected = {name: values.tolist() for name, values in collator(rows).items()}
    for name, values in expected.items():
        assert [row for batch in found["batches"] for row in batch[name]] == values
    assert {len(batch["labels"]) for batch in found["batches"][:-1]} == {8}


def test_every_make_target_of_the_readme_can_be_made() -> None:
    """`make -n` with all variables set says what it would run: a module that is there, and no variable left out."""
    lines = re.findall(r"^(make .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in lines} >= {"demo", "test", "score-corpus", "pretrain", "sweep"}
    for line in [*lines, "make simulate SHARDS=s", "make replay SHARDS=s", "make help"]:
        done = subprocess.run(["bash", "-c", f"{line} -n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        for module in re.findall(r"-m ((?:pipeline|scorer|trainer|benchmarks)\.\w+)", done.stdout):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), line
