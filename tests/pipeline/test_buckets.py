"""Jobs whose corpus, tokenizer, ALM and shards are all in a bucket: the bytes of local folders, whatever the weather.

What must not be lost is looked at from outside: in the server's own answers and files, past the weather and the code.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs.core
import zstandard

from benchmarks.small_job import Job, Run, wait_until, write_alm, write_corpus
from pipeline import progress, score_corpus, status, tokenize_corpus, verify
from pipeline.plan import read_plan
from scorer import files
from tests import object_store
from tests.object_store import S3Server, Weather

ROOT = Path(__file__).parents[2]
IN_THREADS = ("--direct_running_mode", "in_memory")
SPLIT_BYTES = ("--split_bytes", 100_000)
Command = Callable[..., tuple[int, str]]


class Bucket:
    """A bucket as its server has it."""

    def __init__(self, server: S3Server, name: str):
        self._server = server
        self._client = server.client(attempts=3)
        self.name = name
        self.url = f"s3://{name}"

    def put(self, key: str, data: bytes) -> str:
        self._client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"{self.url}/{key}"

    def put_folder(self, folder: Path, prefix: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.url}/{prefix}"

    def objects(self, prefix: str) -> dict[str, bytes]:
        """All objects below a folder, or below the bucket itself, by their names relative to it."""
        prefix = f"{prefix}/" if prefix else ""
        return {found["Key"].removeprefix(prefix): self.read(found["Key"]) for found in self._listed(prefix)}

    def read(self, key: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)

    def identities(self, prefix: str) -> dict[str, object]:
        """What is another for each object that was written anew, even with the same bytes."""
        if self._server.is_durable:
            return self.identities_on_disk(prefix)
        return {
            found["Key"].removeprefix(f"{prefix}/"): (found["LastModified"], found["ETag"])
            for found in self._listed(f"{prefix}/")
        }

    def identities_on_disk(self, prefix: str) -> dict[str, object]:
        """The same, of a server that keeps its data, also while it is down."""
        folder = self._server.folder / "data" / self.name / prefix
        found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
        return {str(path.relative_to(folder)): (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}

    def shards(self, prefix: str) -> set[str]:
        return {found["Key"] for found in self._listed(f"{prefix}/") if found["Key"].endswith(".parquet")}

    def _listed(self, prefix: str) -> list[dict[str, Any]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [found for page in pages for found in page.get("Contents", [])]


@pytest.fixture
def store(s3_server: S3Server, bucket: str) -> Bucket:
    return Bucket(s3_server, bucket)


@pytest.fixture
def durable(s3_server: S3Server) -> S3Server:
    if not s3_server.is_durable:
        pytest.skip("moto does not do this: run `make s3-server`")
    return s3_server


@pytest.fixture
def command(run_command: Command) -> Command:
    """Runs a command in this process, without a traceback of any of its threads."""

    def run(main: Callable[..., int], *arguments: object) -> tuple[int, str]:
        code, err = run_command(main, *arguments)
        assert "Traceback" not in err, err
        return code, err

    return run


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- The whole path


def test_a_bucket_gets_the_bytes_that_a_local_folder_gets(
    *,
    store: Bucket,
    command: Command,
    capfd: pytest.CaptureFixture[str],
    corpus_folder: Path,
    tokenizer_folder: Path,
    alm_folder: Path,
    block_folder: Path,
    hardness_folder: Path,
) -> None:
    """Text to blocks to scores, and all that goes with them: plan, receipts, rejects, manifest and tokenizer."""
    corpus = store.put_folder(corpus_folder, "corpus")
    tokenizer = store.put_folder(tokenizer_folder, "models/tokenizer")
    alm = store.put_folder(alm_folder, "models/alm")
    blocks, shards = f"{store.url}/out/blocks", f"{store.url}/out/shards"

    text = ["--input", corpus, "--tokenizer", tokenizer, "--output", blocks, *SPLIT_BYTES, *IN_THREADS]
    assert command(tokenize_corpus.main, *text)[0] == 0
    assert store.objects("out/blocks") == files_in(block_folder)

    scoring = ["--input", blocks, "--alm", alm, "--output", shards, "--device", "cpu", *IN_THREADS]
    code, err = command(score_corpus.main, *scoring)
    assert code == 0
    assert f"{shards} is complete" in err
    assert store.objects("out/shards") == files_in(hardness_folder)

    for folder in (blocks, shards):
        capfd.readouterr()
        assert status.main([folder, "--json"]) == 0
        seen = json.loads(capfd.readouterr().out)
        assert (seen["state"], seen["damage"], seen["driver"]) == ("complete", [], None)
        assert seen["done"] == seen["planned"] == len(store.shards(folder.removeprefix(f"{store.url}/")))
        assert command(verify.main, folder)[0] == 0

    before = store.identities("out")
    assert command(tokenize_corpus.main, *text)[0] == 0
    assert command(score_corpus.main, *scoring)[0] == 0
    assert store.identities("out") == before


@pytest.fixture(scope="module")
def mixed_corpus(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    """Each form of file, some of it broken, in folders whose names are not plain."""
    folder = tmp_path_factory.mktemp("mixed")
    texts = [json.loads(line)["text"] for line in (corpus_folder / "a.jsonl").read_text().splitlines()[:60]]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    lines[7] = b'{"text": broken'
    (folder / "été & 1+1").mkdir()
    (folder / "été & 1+1" / "a b%20#c.jsonl").write_bytes(b"\n".join(lines[:20]) + b"\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[20:30]) + b"\n"))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines[30:40]) + b"\n"))
    pq.write_table(pa.table({"text": texts[40:50]}), folder / "d.parquet", row_group_size=3)
    (folder / "e.txt").write_text("\n\n".join(texts[50:]))
    (folder / "_hidden.jsonl").write_text("{}")
    return folder


@pytest.mark.parametrize("patterns", [[""], ["/*.jsonl.*", "/d.parquet", "/*/a b*.jsonl"]], ids=["folder", "globs"])
def test_a_corpus_of_any_form_is_read_from_a_bucket(
    *,
    store: Bucket,
    command: Command,
    mixed_corpus: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    patterns: list[str],
) -> None:
    corpus = store.put_folder(mixed_corpus, "corpus")
    store.put("corpus/", b"")  # as consoles make it, to stand for the folder
    flags = ["--tokenizer", tokenizer_folder, "--split_bytes", 4000, *IN_THREADS]
    for root, output in ((mixed_corpus, tmp_path / "blocks"), (corpus, f"{store.url}/blocks/")):
        inputs = [f"{root}{pattern}" for pattern in patterns]
        assert command(tokenize_corpus.main, "--input", *inputs, "--output", output, *flags)[0] == 0
    assert store.objects("blocks") == files_in(tmp_path / "blocks")
    assert len(store.shards("blocks")) > 3
    assert b"broken" not in store.read("blocks/_rejects.jsonl")
    assert store.read("blocks/_rejects.jsonl").count(b"\n") == 1


@pytest.mark.parametrize("output", ["", "/run[1]", "/a b*"])
def test_any_name_will_do(
    store: Bucket, command: Command, corpus_folder: Path, tokenizer_folder: Path, output: str
) -> None:
    """The bucket itself too, names that look like patterns, and folders that a console made before."""
    tokenizer = store.put_folder(tokenizer_folder, "mo[d]els/tokenizer*")
    store.put("mo[d]els/tokenizer*/", b"")
    corpus = store.put("in/a.jsonl", (corpus_folder / "a.jsonl").read_bytes()[:40_000])
    folder = f"{store.url}{output}"
    if output:
        store.put(f"{output[1:]}/", b"")
    flags = ["--input", corpus, "--tokenizer", tokenizer, "--output", folder, "--split_bytes", 20_000, *IN_THREADS]
    assert command(tokenize_corpus.main, *flags)[0] == 0
    assert status.main([folder, "--json"]) == 0
    assert command(verify.main, folder)[0] == 0


@pytest.fixture
def block_job(store: Bucket, command: Command, corpus_folder: Path, tokenizer_folder: Path) -> Callable[[], str]:
    """Tokenizes the small corpus into the bucket; the same again where it is called again. Gives standard error."""
    corpus = store.put("corpus/a.jsonl", (corpus_folder / "a.jsonl").read_bytes())
    flags = ["--input", corpus, "--tokenizer", tokenizer_folder, "--output", f"{store.url}/blocks", *IN_THREADS]

    def tokenize() -> str:
        code, err = command(tokenize_corpus.main, *flags, "--split_bytes", 50_000)
        assert code == 0
        return err

    return tokenize


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "receipt"])
def test_a_damaged_shard_is_found_put_aside_and_made_again(
    store: Bucket, command: Command, block_job: Callable[[], str], how: str
) -> None:
    block_job()
    expected, before = store.objects("blocks"), store.identities("blocks")
    victim = sorted(store.shards("blocks"))[2]
    data = store.read(victim)
    if how == "gone":
        store.remove(victim)
    elif how == "receipt":
        store.put("blocks/_receipts/00002.json", b"{")
    else:
        store.put(victim, data[:-1] if how == "cut" else data[:99] + bytes([data[99] ^ 1]) + data[100:])
    code, err = command(verify.main, f"{store.url}/blocks")
    assert code == 1
    assert victim.removeprefix("blocks/") in err
    err = block_job()
    found = store.objects("blocks")
    aside = sorted(name for name in found if ".damaged-" in name)
    assert len(aside) == (how != "gone")
    for name in aside:
        assert f"{store.url}/{victim} does not have the bytes of its receipt" in err
        assert f"renamed to {store.url}/blocks/{name}" in err
        store.remove(f"blocks/{name}")
    assert store.objects("blocks") == expected
    after = store.identities("blocks")
    remade = {name for name in before if after[name] != before[name]}
    assert remade == {victim.removeprefix("blocks/"), "_receipts/00002.json", "_manifest.json"}
    assert command(verify.main, f"{store.url}/blocks")[0] == 0


# --- What is published


MEBIBYTE = 1 << 20
PART_BYTES = 5 * MEBIBYTE
"""The least that S3 takes."""
PUBLISH = """
import sys
import s3fs.core
from scorer import files
if sys.argv[2] == "in parts":
    s3fs.core.calculate_chunksize = lambda size, chunksize=None, max_parts=0: 5 << 20
files.publish(sys.argv[1], bytes(11 << 20))
"""


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads of more than 10 MiB go in parts; s3fs would begin with 100."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None, max_parts=0: PART_BYTES)


def publish_at_once(path: str, size: int) -> tuple[list[bool], list[bytes]]:
    data = [bytes([index]) * size for index in range(4)]
    with ThreadPoolExecutor(len(data)) as pool:
        return list(pool.map(lambda part: files.publish(path, part), data)), data


def test_of_many_writers_exactly_one_publishes(store: Bucket) -> None:
    published, data = publish_at_once(f"{store.url}/a", 100_000)
    assert published.count(True) == 1
    assert store.objects("") == {"a": data[published.index(True)]}


@pytest.mark.usefixtures("in_parts")
def test_of_many_uploads_in_parts_exactly_one_publishes(store: Bucket, weather: Weather) -> None:
    published, data = publish_at_once(f"{store.url}/a", 11 * MEBIBYTE)
    assert weather.done["PUT"] >= 4 * 3  # parts
    assert published.count(True) == 1
    assert store.objects("") == {"a": data[published.index(True)]}


def test_what_was_published_and_not_answered_is_published(store: Bucket, weather: Weather) -> None:
    weather.every(lost_puts=1)
    assert files.publish(f"{store.url}/a", b"mine")
    assert weather.done["lost_puts"] == 1
    assert not files.publish(f"{store.url}/a", b"theirs")
    assert store.objects("") == {"a": b"mine"}


@pytest.mark.usefixtures("in_parts")
def test_an_upload_in_parts_of_which_no_end_was_heard_is_published(store: Bucket, weather: Weather) -> None:
    weather.every(lost_puts=3, lost_posts=2)  # of POSTs, the first begins and the second ends
    data = os.urandom(11 * MEBIBYTE)
    assert files.publish(f"{store.url}/a", data)
    assert weather.done["lost_posts"] >= 1
    assert weather.done["lost_puts"] >= 1
    assert store.objects("") == {"a": data}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["at once", "in parts"])
def test_an_upload_that_is_killed_leaves_nothing_to_be_seen(store: Bucket, weather: Weather, how: str) -> None:
    weather.slow(bandwidth=4 * MEBIBYTE)
    process = subprocess.Popen([sys.executable, "-c", PUBLISH, f"{store.url}/folder/a", how], cwd=ROOT)
    try:
        is_under_way = wait_until(lambda: sum(weather.uploaded.values()) > 2 * MEBIBYTE or process.poll() is not None)
        assert is_under_way
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert 2 * MEBIBYTE < sum(weather.uploaded.values()) < 11 * MEBIBYTE
    assert any("partNumber" in path for path in weather.uploaded) == (how == "in parts")
    weather.clear()
    assert store.objects("") == {}
    assert files.names(f"{store.url}/folder") == []
    assert files.publish(f"{store.url}/folder/a", b"whole")
    assert store.objects("") == {"folder/a": b"whole"}


def test_a_small_file_that_is_written_anew_is_read_as_it_was_or_as_it_is(store: Bucket, weather: Weather) -> None:
    """Reports of what is in flight change every few seconds, and their size with them."""
    store.put("a", b"12345678")
    weather.slow(delay=0.5)  # after a HEAD has its answer, and before it is heard

    def write() -> None:
        wait_until(lambda: weather.done["requests"] > 0)
        wait_until(lambda: weather.done["delays"] > 0)
        store.put("a", b"1234")

    writer = threading.Thread(target=write)
    writer.start()
    found = files.read_bytes(f"{store.url}/a")
    writer.join()
    assert found in (b"12345678", b"1234")


def test_what_is_put_aside_is_put_aside_though_answers_are_lost(store: Bucket, weather: Weather) -> None:
    store.put("folder/a", b"damaged")
    weather.every(lost_posts=1)
    aside = files.set_aside(f"{store.url}/folder/a")
    assert store.objects("") == {aside.removeprefix(f"{store.url}/"): b"damaged"}


# --- Faults


@pytest.fixture(scope="module")
def local_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Some 20 shards, of which one worker makes several in a second; some of the text is broken."""
    folder = tmp_path_factory.mktemp("job")
    corpus = write_corpus(folder / "corpus", documents=90)
    return Job(corpus, write_alm(folder / "alm", corpus, layers=1, dimensions=64), split_bytes=7500, workers=1)


@pytest.fixture(scope="module")
def expected(local_job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job gives in a local folder, undisturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    assert score_corpus.main([*local_job.flags(output), *IN_THREADS]) == 0
    assert b"broken" not in (output / "_rejects.jsonl").read_bytes()
    assert (output / "_rejects.jsonl").stat().st_size > 0
    return files_in(output)


@pytest.fixture
def flags(store: Bucket, local_job: Job) -> list[str]:
    """Of the same job, all in the bucket."""
    places = {
        str(local_job.corpus): store.put_folder(local_job.corpus, "corpus"),
        str(local_job.alm): store.put_folder(local_job.alm, "alm"),
    }
    return [places.get(flag, flag) for flag in local_job.flags(Path("out"))] + ["--output", f"{store.url}/out"]


@pytest.fixture
def start(
    flags: list[str], weather: Weather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    """Starts the job as a user would; whatever still runs in the end is killed."""
    monkeypatch.setattr(object_store, "_PIECE_BYTES", 1 << 10)  # a shard has some 15 kB
    with ExitStack() as stack:

        def begin(patience: float = 300.0) -> Run:
            environment = {**os.environ, "HARDNESS_STORE_PATIENCE": str(patience), "TMPDIR": str(tmp_path)}
            run = Run([sys.executable, "-m", "pipeline.score_corpus", *flags], tmp_path / "log", environment)
            stack.callback(run.kill_group)
            return run

        yield begin


def wait_for_shards(run: Run, store: Bucket, count: int = 2) -> None:
    assert wait_until(lambda: run.is_over or len(store.shards("out")) >= count)
    assert not run.is_over, run.text


def wait_for_an_upload(run: Run, weather: Weather, expected: Mapping[str, bytes]) -> str:
    """Makes the line slow, waits until the first half of a shard has gone over it, and gives the shard's name."""

    def under_way() -> list[str]:
        uploaded = {path.rpartition("/")[2]: count for path, count in weather.uploaded.copy().items()}
        shards = {name: data for name, data in expected.items() if name.endswith(".parquet")}
        return [name for name, data in shards.items() if 2000 < uploaded.get(name, 0) < len(data) / 2]

    weather.slow(bandwidth=10_000)
    assert wait_until(lambda: run.is_over or bool(under_way()))
    assert not run.is_over, run.text
    (name,) = under_way()
    return name


def ends(run: Run, code: int) -> bool:
    assert run.wait() == code, run.text
    assert "Traceback" not in run.text, run.text
    return True


def finish(command: Command, flags: list[str]) -> None:
    """The same command to its end, in this process, which has imported everything already."""
    code, err = command(score_corpus.main, *flags, *IN_THREADS)
    assert code == 0, err


def check(command: Command, store: Bucket, expected: Mapping[str, bytes], before: Mapping[str, object]) -> None:
    """The bytes of a calm run and nothing beside, and of the shards that were there, none written again."""
    assert store.objects("out") == expected
    after = store.identities("out")
    assert [name for name in before if name.endswith(".parquet") and after[name] != before[name]] == []
    assert command(verify.main, f"{store.url}/out")[0] == 0


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_a_worker_that_is_killed_while_it_uploads_is_replaced(
    start: Callable[..., Run], store: Bucket, weather: Weather, command: Command, expected: dict[str, bytes]
) -> None:
    run = start()
    wait_for_shards(run, store)
    name = wait_for_an_upload(run, weather, expected)
    before = store.identities("out")
    (worker,) = run.workers()
    worker.kill()
    assert name not in store.objects("out")
    weather.clear()
    assert ends(run, 0)
    assert f"{name} at " in run.text
    assert "died (signal 9); it is tried again" in run.text
    assert len(before) > 2
    assert name not in before
    check(command, store, expected, before)


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_a_driver_that_is_killed_while_its_worker_uploads_bars_no_rerun(
    *,
    start: Callable[..., Run],
    store: Bucket,
    weather: Weather,
    command: Command,
    flags: list[str],
    expected: dict[str, bytes],
) -> None:
    run = start()
    wait_for_shards(run, store)
    name = wait_for_an_upload(run, weather, expected)
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert wait_until(lambda: not run.group())
    before = store.identities("out")
    assert name not in before
    assert {"_driver.json", "_plan.json"} <= before.keys()
    assert all(store.objects("out")[shard] == expected[shard] for shard in before if shard.endswith(".parquet"))
    weather.clear()
    finish(command, flags)
    check(command, store, expected, before)


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_a_job_outlasts_its_server(
    *,
    start: Callable[..., Run],
    durable: S3Server,
    store: Bucket,
    weather: Weather,
    command: Command,
    expected: dict[str, bytes],
) -> None:
    run = start()
    wait_for_shards(run, store)
    before = store.identities("out")
    durable.kill()
    lost = weather.done["outages"]
    assert wait_until(lambda: run.is_over or weather.done["outages"] >= lost + 6)
    durable.start()
    assert ends(run, 0)
    assert weather.done["outages"] >= lost + 6
    check(command, store, expected, before)


@pytest.mark.slow
def test_a_job_whose_server_stays_away_ends_with_a_message_and_goes_on_when_it_is_back(
    *,
    durable: S3Server,
    store: Bucket,
    command: Command,
    flags: list[str],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before: dict[str, object] = {}

    def kill() -> None:
        assert wait_until(lambda: len(store.shards("out")) >= 2)
        durable.kill()
        before.update(store.identities_on_disk("out"))

    monkeypatch.setenv("HARDNESS_STORE_PATIENCE", "1.5")
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        code, err = command(score_corpus.main, *flags, *IN_THREADS)
        killing.result()
    assert code == 1
    message = err.rpartition("error: ")[2]
    assert f"{store.url}/out" in message
    assert "gave no answer for 2 s" in message
    assert "Run the same command again" in message
    assert "_manifest.json" not in before
    durable.start()
    finish(command, flags)
    check(command, store, expected, before)


def test_the_reports_of_a_driver_outlast_its_server(
    store: Bucket, weather: Weather, block_job: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job itself says what is wrong; a thread that reports how far it is must not end with a traceback."""
    block_job()
    folder = f"{store.url}/blocks"
    plan = read_plan(folder)
    assert plan is not None
    ends: list[object] = []
    monkeypatch.setattr(threading, "excepthook", ends.append)
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0.01)
    monkeypatch.setenv("HARDNESS_STORE_PATIENCE", "0.1")
    weather.every(drops=1)
    with progress.reporting_progress(folder, plan):
        assert wait_until(lambda: bool(ends) or weather.done["drops"] > 10)
    assert ends == []


@pytest.mark.slow
def test_a_job_ends_well_in_the_worst_of_weathers(
    store: Bucket, weather: Weather, command: Command, flags: list[str], expected: dict[str, bytes]
) -> None:
    faults = {"drops": 10, "resets": 7, "cuts": 5, "slow_downs": 9, "lost_puts": 4}
    weather.every(**faults)
    weather.slow(delay=0.005)
    finish(command, flags)
    assert all(weather.done[fault] > 1 for fault in faults if fault != "resets"), weather.done
    assert weather.done["resets"] >= 1
    assert weather.done["delays"] > 100
    assert command(verify.main, f"{store.url}/out")[0] == 0
    weather.clear()
    check(command, store, expected, {})


# --- What users do wrong


@pytest.fixture
def refuse(store: Bucket, command: Command, corpus_folder: Path, tokenizer_folder: Path) -> Callable[..., str]:
    """Runs tokenize_corpus, which must fail before it writes a shard; gives its one message."""
    corpus = store.put("corpus/a.jsonl", (corpus_folder / "a.jsonl").read_bytes())

    def run(code: int = 2, input: str = corpus, output: str = f"{store.url}/out") -> str:
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # it may have been made for other credentials
        flags = ["--input", input, "--tokenizer", tokenizer_folder, "--output", output, *IN_THREADS]
        found, err = command(tokenize_corpus.main, *flags)
        assert found == code, err
        _, is_there, message = err.rpartition("error: ")
        assert is_there, err
        assert message.count("\n") == 1
        assert message.endswith("\n")
        assert store.shards("out") == set()
        return message.strip()

    return run


@pytest.mark.parametrize("which", ["input", "output"])
@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials_are_an_error_that_says_where_they_come_from(
    *,
    refuse: Callable[..., str],
    durable: S3Server,
    corpus_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    variable: str,
    value: str,
    code: str,
) -> None:
    """Of a HEAD, which is what comes first, the answer has no body that could say which of the two it is."""
    monkeypatch.setenv(variable, value)
    message = refuse() if which == "input" else refuse(input=str(corpus_folder))
    for words in ("s3://", "the store refuses", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        assert words in message
    assert ("corpus/a.jsonl" if which == "input" else "/out") in message


def test_no_credentials_are_an_error_that_says_where_they_come_from(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = refuse()
    assert "Unable to locate credentials" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_a_bucket_that_is_not_there_to_write_to_is_named(refuse: Callable[..., str]) -> None:
    message = refuse(output="s3://no-such-bucket/out")
    assert "s3://no-such-bucket/out/_plan.json cannot be written: its bucket does not exist" in message


@pytest.mark.parametrize("path", ["s3://no-such-bucket", "s3://no-such-bucket/a", "s3://no-such-bucket/*.jsonl"])
def test_a_bucket_that_is_not_there_to_read_from_is_named(refuse: Callable[..., str], path: str) -> None:
    message = refuse(input=path)
    assert path in message
    assert "check the " in message


def test_whoever_may_not_write_is_told(
    refuse: Callable[..., str], durable: S3Server, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (durable.read_only_environment(store.name) or {}).items():
        monkeypatch.setenv(name, value)
    message = refuse()
    assert f"{store.url}/out/_plan.json: the store refuses (" in message
    assert "what they may do there" in message
    assert store.objects("out") == {}


def test_a_server_that_is_not_there_is_waited_for_and_named(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARDNESS_STORE_PATIENCE", "1")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        message = refuse(code=1)
    assert "corpus/a.jsonl" in message
    assert "the store gave no answer for 1 s" in message
    assert "HARDNESS_STORE_PATIENCE" in message
