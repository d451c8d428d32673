from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from fasc_lightning._utils import check_json_files, whole_file, whole_folder


def write(folder, content="new", keep=re.compile("stale.*")):
    with whole_folder(folder, lambda name: keep.fullmatch(name) is not None) as temporary:
        (temporary / "a").write_text(content)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b").write_text(content)


def fail_with_half_of(file):
    file.write_text("half")
    raise KeyError


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_that_fails_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "deep" / "file"
    with whole_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), whole_file(path) as temporary:
        fail_with_half_of(temporary)
    assert tree(tmp_path) == {"deep/file": "old"}


def test_a_new_folder(tmp_path):
    write(tmp_path / "deep" / "folder")
    assert tree(tmp_path) == {"deep/folder/a": "new", "deep/folder/inner/b": "new"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE((tmp_path / "deep" / "folder").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_earlier_folder_gives_way_and_what_is_not_ours_stays(tmp_path):
    folder = tmp_path / "folder"
    write(folder, "old")
    (folder / "stale.1").write_text("")
    (folder / "notes").write_text("mine")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "1").write_text("mine")
    (folder / "link").symlink_to("notes")
    folder.chmod(0o750)
    write(folder)
    assert tree(tmp_path) == {
        "folder/a": "new",
        "folder/inner/b": "new",
        "folder/notes": "mine",
        "folder/link": "mine",
        "folder/.git/objects/1": "mine",
    }
    assert (folder / "link").is_symlink()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def no_link(*args, **options):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_link)
    write(tmp_path / "folder", "old")
    (tmp_path / "folder" / "notes").write_text("mine")
    write(tmp_path / "folder")
    assert tree(tmp_path / "folder") == {"a": "new", "inner/b": "new", "notes": "mine"}


def test_a_linked_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real") == {"a": "new", "inner/b": "new"}


@pytest.mark.parametrize("earlier", [True, False])
def test_a_block_that_fails_changes_nothing(tmp_path, earlier):
    if earlier:
        write(tmp_path / "folder", "old")
    before = tree(tmp_path)
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder", lambda name: False) as temporary:
        fail_with_half_of(temporary / "a")
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] * earlier


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_changes_nothing(tmp_path, monkeypatch, failing):
    write(tmp_path / "folder", "old")
    rename, calls = Path.rename, []

    def rename_once(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(PermissionError, match="no"):
        write(tmp_path / "folder")
    assert tree(tmp_path) == {"folder/a": "old", "folder/inner/b": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="but it is a file"):
        write(tmp_path / "file")
    assert tree(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00"])
def test_damaged_json_is_refused_by_name(tmp_path, content):
    good, bad = tmp_path / "a.json", tmp_path / "b.json"
    good.write_text("[1]")
    check_json_files([good, bad, tmp_path / "nowhere" / "c.json"])
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        check_json_files([good, bad])
