"""The real file system behind the protocol, and atomic writing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from splitlearn_manager.config.files import DirEntry, RealFileSystem, write_atomically


def test_directory_entries_tell_directories_files_and_links_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    (tmp_path / "to_dir").symlink_to("dir")
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    entries = sorted(RealFileSystem().list_dir(str(tmp_path)), key=lambda entry: entry.name)
    assert [entry.stat for entry in entries if entry.name != "file"] == [None] * 5
    assert entries[2].stat == RealFileSystem().stat(str(tmp_path / "file"))
    assert [entry._replace(stat=None) for entry in entries] == [
        DirEntry("dangling", False, True),
        DirEntry("dir", True, False),
        DirEntry("file", False, False),
        DirEntry("loop", False, True),
        DirEntry("to_dir", True, True),
        DirEntry("to_file", False, True),
    ]


def test_stat_follows_links_and_names_what_identifies_the_content(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"abc")
    link.symlink_to(file)
    fs = RealFileSystem()
    found, real = fs.stat(str(link)), os.stat(file)
    assert found == fs.stat(str(file))
    assert found.fingerprint == (
        real.st_dev,
        real.st_ino,
        3,
        real.st_mtime_ns,
        real.st_ctime_ns,
    )
    assert not found.is_dir
    assert fs.stat(str(tmp_path)).is_dir


def test_read_stops_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    assert RealFileSystem().read(str(tmp_path / "file"), 4) == b"abcd"
    assert RealFileSystem().read(str(tmp_path / "file"), 40) == b"abcdef"


def test_named_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        RealFileSystem().read(str(tmp_path / "pipe"), 10)
    with pytest.raises(IsADirectoryError):
        RealFileSystem().read(str(tmp_path), 10)
    with pytest.raises(FileNotFoundError):
        RealFileSystem().read(str(tmp_path / "none"), 10)


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    inode = path.stat().st_ino
    path.chmod(0o600)
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_ino != inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
