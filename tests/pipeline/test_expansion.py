"""What `--input` stands for: files, folders and globs, local and in stores; `memory://` stands for object stores."""

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.expansion import expand
from scorer import files
from scorer.errors import ConfigurationError


class TestExpand:
    SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")

    @pytest.fixture
    def tree(self, folder):
        for name in ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "sub/d.JSONL", "notes.md", "[x].txt"):
            parent = name.rpartition("/")[0]
            files.make_folder(files.join(folder, parent) if parent else folder)
            files.publish(files.join(folder, name), b"x")
        return folder

    def expand(self, tree, *patterns):
        """Names below the tree."""
        found = expand([files.join(tree, pattern) if pattern else tree for pattern in patterns], self.SUFFIXES)
        assert all(files.read_bytes(path) == b"x" for path in found)
        root = tree.removeprefix("file://").removeprefix("memory://") + "/"
        return [path.partition(root)[2] for path in found]

    def test_a_folder_is_every_file_below_it_with_a_known_suffix(self, tree):
        assert self.expand(tree, "") == ["[x].txt", "a.txt", "b.jsonl", "sub/c.jsonl.gz", "sub/d.JSONL"]

    def test_order_is_that_given_sorted_within_each_without_repetition(self, tree):
        assert self.expand(tree, "sub", "b.jsonl", "*.txt", "b.jsonl", "sub/c.jsonl.gz") == [
            *("sub/c.jsonl.gz", "sub/d.JSONL", "b.jsonl", "[x].txt", "a.txt"),
        ]

    def test_a_glob_takes_files_only(self, tree):
        assert self.expand(tree, "*") == ["[x].txt", "a.txt", "b.jsonl", "notes.md"]
        assert self.expand(tree, "**/*.jsonl*") == ["b.jsonl", "sub/c.jsonl.gz"]

    def test_a_file_whose_name_looks_like_a_glob_is_itself(self, tree):
        assert self.expand(tree, "[x].txt") == ["[x].txt"]

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("nothing.txt", "there is no .*nothing.txt"),
            ("*.csv", r"no file matches .*\*\.csv"),
            ("[z].txt", r"no file matches .*\[z\]\.txt"),
        ],
    )
    def test_what_is_missing_is_named(self, tree, pattern, message):
        with pytest.raises(ConfigurationError, match=message):
            self.expand(tree, pattern)

    def test_one_missing_among_several_is_an_error(self, tree):
        with pytest.raises(ConfigurationError, match=r"nothing\.txt"):
            self.expand(tree, "a.txt", "nothing.txt")

    def test_sizes_come_with_the_listing(self, tree, monkeypatch):
        files.publish(files.join(tree, "sub", "e.txt"), b"longer")
        monkeypatch.setattr(files, "size", None)
        for filesystem in (MemoryFileSystem, LocalFileSystem):
            monkeypatch.setattr(filesystem, "size", None)
        for pattern in ("sub", "sub/*"):
            sizes = expand([files.join(tree, pattern)], self.SUFFIXES)
            assert [(path.rpartition("/")[2], size) for path, size in sizes.items()] == [
                *(("c.jsonl.gz", 1), ("d.JSONL", 1), ("e.txt", 6)),
            ]

    def test_hidden_files_and_folders_are_left_out(self, tree):
        for name in ("_a.txt", ".b.txt", "_work/c.txt", "sub/.cache/d.txt"):
            files.make_folder(files.join(tree, name).rpartition("/")[0])
            files.publish(files.join(tree, name), b"x")
        assert self.expand(tree, "") == ["[x].txt", "a.txt", "b.jsonl", "sub/c.jsonl.gz", "sub/d.JSONL"]
        assert self.expand(tree, "_work") == ["_work/c.txt"]  # whoever names it, means it
        assert self.expand(tree, "_*.txt") == ["_a.txt"]

    def test_a_file_that_is_spelled_twice_is_one(self, tmp_path, monkeypatch):
        (tmp_path / "a" / "deep").mkdir(parents=True)
        (tmp_path / "b.txt").write_text("b")
        (tmp_path / "a" / "b.txt").write_text("another of this name")
        (tmp_path / "link").symlink_to(tmp_path / "a" / "deep")
        (tmp_path / "whole").symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        b, other = str(tmp_path / "b.txt"), str(tmp_path / "a" / "b.txt")
        same = ["./b.txt", "a/../b.txt", b, f"file://{b}", f"{tmp_path}//b.txt", "*.txt", "whole/b.txt", "a/./../b.txt"]
        for first in same[:-2]:
            assert expand([first, *same], self.SUFFIXES) == {b: 1}
        assert expand(["link/../b.txt", *same], self.SUFFIXES) == {
            other: 20,
            b: 1,
        }  # '..' of where the link leads
        assert expand([".", "a"], self.SUFFIXES) == {other: 20, b: 1}

    def test_a_linked_file_has_its_own_name_and_the_size_of_what_it_leads_to(self, tmp_path):
        (tmp_path / "a.txt").write_text("text")
        (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
        assert list(expand([str(tmp_path)], self.SUFFIXES).values()) == [4, 4]

    @pytest.mark.parametrize("pattern", ["", "*.txt"])
    def test_a_link_to_nowhere_is_named(self, tmp_path, pattern):
        (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
        with pytest.raises(ConfigurationError, match=r"lost\.txt is not there: is it a broken link"):
            expand([str(tmp_path / pattern)], self.SUFFIXES)

    def test_a_folder_without_a_known_suffix_says_which_are_known(self, folder):
        files.publish(files.join(folder, "notes.md"), b"x")
        with pytest.raises(ConfigurationError, match=r"holds no file that ends in \.jsonl, \.jsonl\.gz, \.txt"):
            expand([folder], self.SUFFIXES)
