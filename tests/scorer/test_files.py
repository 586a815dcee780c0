"""Paths through fsspec: publishing whole and once, finding inputs, tidying up. `memory://` stands for object stores."""

import errno
import gzip
import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from scorer import files
from scorer.errors import ConfigurationError, HardnessError, StorageError


class TestPublish:
    def test_first_writer_wins(self, folder):
        path = files.join(folder, "a.bin")
        assert files.publish(path, b"first")
        assert not files.publish(path, b"second")
        assert files.read_bytes(path) == b"first"
        assert files.names(folder) == ["a.bin"]

    def test_of_many_writers_exactly_one_publishes(self, tmp_path):
        path = str(tmp_path / "a.bin")
        data = [bytes([i]) * 100_000 for i in range(16)]
        with ThreadPoolExecutor(8) as pool:
            published = list(pool.map(lambda part: files.publish(path, part), data))
        assert published.count(True) == 1
        assert files.read_bytes(path) == data[published.index(True)]
        assert files.names(str(tmp_path)) == ["a.bin"]

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        for write in (files.publish, files.replace):
            with pytest.raises(StorageError, match=r"a\.bin cannot be written: No space"):
                write(str(tmp_path / "a.bin"), b"data")
        assert list(tmp_path.iterdir()) == []

    def test_a_temporary_that_vanished_is_said(self, tmp_path, monkeypatch):
        link = os.link

        def vanish(source, target):
            os.unlink(source)
            return link(source, target)

        monkeypatch.setattr(os, "link", vanish)
        with pytest.raises(FileNotFoundError):
            files.publish(str(tmp_path / "a.bin"), b"data")

    def test_temporaries_lie_beside_the_file_and_are_no_parquet(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(os, "link", lambda source, target: seen.append((source, os.listdir(tmp_path))))
        files.publish(str(tmp_path / "a.parquet"), b"data")
        ((source, names),) = seen
        assert Path(source).parent == tmp_path
        assert names == [Path(source).name]
        assert files.is_temporary(names[0])
        assert not names[0].endswith(".parquet")
        assert list(tmp_path.iterdir()) == []

    def test_replace_writes_over_what_is_there(self, folder):
        path = files.join(folder, "a.bin")
        files.replace(path, b"first")
        files.replace(path, b"second")
        assert files.read_bytes(path) == b"second"
        assert files.names(folder) == ["a.bin"]

    @pytest.mark.parametrize("name", ["two words.bin", "ünïcode 文.bin", "[0] * ?.bin", "100%.bin", "#fragment.bin"])
    def test_any_name_will_do(self, folder, name):
        path = files.join(folder, name)
        assert files.publish(path, b"data")
        assert files.exists(path)
        assert files.size(path) == 4
        assert files.read_bytes(path) == b"data"
        assert files.names(folder) == [name]
        files.remove(path)
        assert not files.exists(path)

    def test_set_aside_takes_a_damaged_file_out_of_every_readers_sight(self, folder):
        path = files.join(folder, "shard-00000-of-00001.parquet")
        files.publish(path, b"damaged")
        files.set_aside(path)
        assert not files.exists(path)
        (name,) = files.names(folder)
        assert not name.endswith(".parquet")
        assert files.read_bytes(files.join(folder, name)) == b"damaged"


class TestStaged:
    def test_what_is_staged_is_published_once(self, folder):
        path = files.join(folder, "a.bin")
        for data, is_first in ((b"first", True), (b"second", False)):
            with files.staged(path) as temporary:
                assert not Path(temporary).exists()
                Path(temporary).write_bytes(data)
                assert files.publish_staged(temporary, path) == is_first
            assert not Path(temporary).exists()
        assert files.read_bytes(path) == b"first"
        assert files.names(folder) == ["a.bin"]

    def test_nothing_is_left_of_what_is_staged_and_not_published(self, folder):
        def fail(path):
            with files.staged(path) as temporary:
                Path(temporary).write_bytes(b"half")
                seen.append(temporary)
                raise RuntimeError

        seen = []
        with pytest.raises(RuntimeError):
            fail(files.join(folder, "a.bin"))
        assert not Path(seen[0]).exists()
        assert files.names(folder) == []

    def test_writers_of_one_file_stage_it_under_different_names(self, folder):
        path = files.join(folder, "a.parquet")
        with files.staged(path) as one, files.staged(path) as other:
            assert one != other
            assert all(files.is_temporary(Path(name).name) and not name.endswith(".parquet") for name in (one, other))

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG])
    def test_what_no_other_attempt_would_mend_is_a_storage_error(self, folder, code):
        def fail(path):
            with files.staged(path):
                raise OSError(code, os.strerror(code))

        with pytest.raises(StorageError, match=rf"a\.bin cannot be written: {os.strerror(code)}"):
            fail(files.join(folder, "a.bin"))

    @pytest.mark.parametrize("code", [errno.ESTALE, errno.EINTR, errno.ETIMEDOUT])
    def test_what_may_pass_stays_what_it_is(self, folder, code):
        def fail(path):
            with files.staged(path):
                raise OSError(code, os.strerror(code))

        with pytest.raises(OSError, match=os.strerror(code)):
            fail(files.join(folder, "a.bin"))


class TestKeepOrReplace:
    def test_writes_pieces_where_there_is_nothing_or_something_else(self, folder):
        path = files.join(folder, "a.bin")
        for pieces in ([], [b"one ", b"two"], [b"one"], [b"two"]):
            files.keep_or_replace(path, iter(pieces))
            assert files.read_bytes(path) == b"".join(pieces)
            assert files.names(folder) == ["a.bin"]

    def test_leaves_alone_what_is_there_already(self, tmp_path):
        path = tmp_path / "a.bin"
        path.write_bytes(b"one two")
        before = path.stat().st_ino
        files.keep_or_replace(str(path), [b"one", b" two"])
        assert path.stat().st_ino == before
        files.keep_or_replace(str(path), [b"one", b" too"])
        assert path.read_bytes() == b"one too"

    def test_a_failure_half_way_leaves_what_was_there(self, folder):
        def pieces():
            yield b"half"
            raise RuntimeError

        path = files.join(folder, "a.bin")
        files.replace(path, b"whole")
        with pytest.raises(RuntimeError):
            files.keep_or_replace(path, pieces())
        assert files.read_bytes(path) == b"whole"
        assert files.names(folder) == ["a.bin"]


class TestFreeBytes:
    def test_are_those_of_the_disk_that_holds_the_folder_or_will(self, tmp_path, monkeypatch):
        def usage(path):
            assert path == str(tmp_path)
            return SimpleNamespace(total=10, used=3, free=7)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        for name in ("", "a", "a/b/c"):
            assert files.free_bytes(str(tmp_path / name)) == 7
            assert files.free_bytes(f"file://{tmp_path / name}") == 7

    def test_are_unknown_in_object_stores(self):
        assert files.free_bytes("memory://bucket/a") is None


class TestReading:
    def test_sizes_hashes_and_json(self, folder):
        path = files.join(folder, "a.json")
        files.publish(path, files.to_json({"b": 1, "a": "ü"}))
        assert files.read_bytes(path).decode() == '{\n  "a": "ü",\n  "b": 1\n}\n'
        assert files.read_json(path) == {"a": "ü", "b": 1}
        assert files.size(path) == 26
        files.replace(path, b"abc")
        assert files.sha256(path) == ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 3)  # NIST's

    def test_what_is_missing(self, folder):
        path = files.join(folder, "nothing")
        assert not files.exists(path)
        assert not files.is_folder(path)
        assert files.names(path) == []
        files.remove(path)
        with pytest.raises(FileNotFoundError):
            files.read_json(path)

    def test_decompresses_where_asked(self, folder):
        path = files.join(folder, "a.gz")
        files.publish(path, gzip.compress(b"text"))
        with files.open_binary(path, "gzip") as stream:
            assert stream.read() == b"text"

    def test_local_paths_are_those_of_the_operating_system(self, tmp_path):
        assert files.local_path(str(tmp_path)) == str(tmp_path)
        assert files.local_path(f"file://{tmp_path}") == str(tmp_path)
        assert files.local_path("memory://a") is None

    def test_an_unknown_protocol_is_a_configuration_error(self):
        with pytest.raises(ConfigurationError, match="nosuch://bucket/a"):
            files.exists("nosuch://bucket/a")

    @pytest.mark.parametrize(
        ("parts", "joined"),
        [
            (("a", "b"), "a/b"),
            (("a/", "b", "c"), "a/b/c"),
            (("s3://bucket/", "b"), "s3://bucket/b"),
            (("/", "a"), "/a"),
        ],
    )
    def test_join(self, parts, joined):
        assert files.join(*parts) == joined


class TestFolders:
    def test_put_folder_moves_files_into_place(self, folder):
        target = files.join(folder, "tokenizer")
        files.put_folder(target, lambda scratch: [Path(scratch, name).write_text(name) for name in "ab"])
        assert files.names(target) == ["a", "b"]
        assert files.read_bytes(files.join(target, "b")) == b"b"

    def test_local_folder_gives_a_path_that_libraries_can_read(self, folder):
        files.make_folder(files.join(folder, "model"))
        files.publish(files.join(folder, "model", "config.json"), b"{}")
        with files.local_folder(files.join(folder, "model")) as local:
            assert Path(local, "config.json").read_bytes() == b"{}"

    def test_remove_temporaries_leaves_everything_else(self, folder):
        kept = [".hidden", "a.tmp", "shard.parquet", "_manifest.json"]
        for name in [*kept, ".shard.parquet.0123.tmp"]:
            files.publish(files.join(folder, name), b"x")
        files.remove_temporaries(folder)
        assert files.names(folder) == sorted(kept)

    def test_remove_temporaries_spares_what_was_just_written(self, tmp_path):
        for name, age in ((".old.1.tmp", 700), (".young.1.tmp", 500), ("old.parquet", 700)):
            (tmp_path / name).write_bytes(b"x")
            os.utime(tmp_path / name, (time.time() - age,) * 2)
        files.remove_temporaries(str(tmp_path), older_than=600)
        assert files.names(str(tmp_path)) == [".young.1.tmp", "old.parquet"]
        files.remove_temporaries(str(tmp_path))
        assert files.names(str(tmp_path)) == ["old.parquet"]

    def test_remove_temporaries_looks_at_the_age_in_object_stores_too(self):
        folder = f"memory://{uuid.uuid4().hex}"
        files.replace(files.join(folder, ".young.1.tmp"), b"x")
        files.remove_temporaries(folder, older_than=600)
        assert files.names(folder) == [".young.1.tmp"]
        files.remove_temporaries(folder)
        assert files.names(folder) == []

    def test_remove_temporaries_of_no_folder_does_nothing(self, tmp_path):
        files.remove_temporaries(str(tmp_path / "nothing"))
        assert list(tmp_path.iterdir()) == []


def test_errors_have_one_root():
    assert issubclass(ConfigurationError, HardnessError)
    assert ConfigurationError.exit_code == 2
    assert HardnessError.exit_code == 1
