"""What the scanner promises about a directory: names, links, holes. Real files where they can show it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from splitlearn_manager.config.files import RealFileSystem
from splitlearn_manager.desired.scanner import Scan, Scanner
from support.fake_fs import FakeFileSystem


def scan(root: Path) -> Scan:
    return Scanner(root, RealFileSystem()).scan()


def put(path: Path, text: str = "model_id: x\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def fs() -> FakeFileSystem:
    fake = FakeFileSystem()
    fake.mkdir("/d")
    return fake


def test_yaml_and_yml_are_found_recursively_with_their_fingerprint(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml")
    put(tmp_path / "team" / "nlp" / "b.yml")
    put(tmp_path / "notes.txt")
    found = scan(tmp_path)
    assert found.complete
    assert found.error is None
    assert sorted(found.files) == ["a.yaml", "team/nlp/b.yml"]
    stat = os.stat(tmp_path / "a.yaml")
    assert found.files["a.yaml"].fingerprint == (
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    )


@pytest.mark.parametrize(
    "name",
    ["x.yaml~", ".x.yaml.swp", "#x.yaml#", "4913", ".x.yaml", ".#x.yaml", "x.yaml.bak", "x.json"],
)
def test_editor_backups_and_dotfiles_are_not_picked_up(tmp_path: Path, name: str) -> None:
    put(tmp_path / name)
    put(tmp_path / ".git" / "x.yaml")
    found = scan(tmp_path)
    assert found.complete
    assert not found.files


def test_server_yaml_at_the_root_is_no_model_file_but_deeper_it_is(tmp_path: Path) -> None:
    put(tmp_path / "server.yaml", "port: 1\n")
    put(tmp_path / "deep" / "server.yaml")
    found = scan(tmp_path)
    assert found.server is not None
    assert found.server.path == "server.yaml"
    assert list(found.files) == ["deep/server.yaml"]


def test_mounted_configmap_is_followed_through_its_data_link(tmp_path: Path) -> None:
    put(tmp_path / "..2024" / "bert.yaml", "old")
    put(tmp_path / "..2025" / "bert.yaml", "newer")
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "bert.yaml").symlink_to("..data/bert.yaml")
    before = scan(tmp_path)
    assert list(before.files) == ["bert.yaml"]
    (tmp_path / "..data_tmp").symlink_to("..2025")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
    after = scan(tmp_path)
    assert after.files["bert.yaml"].fingerprint != before.files["bert.yaml"].fingerprint
    assert after.root == before.root


def test_git_sync_root_link_is_followed_to_the_new_worktree(tmp_path: Path) -> None:
    put(tmp_path / "rev1" / "a.yaml")
    put(tmp_path / "rev2" / "b.yaml")
    link = tmp_path / "current"
    link.symlink_to("rev1")
    before = scan(link)
    (tmp_path / "tmp").symlink_to("rev2")
    os.replace(tmp_path / "tmp", link)
    after = scan(link)
    assert (list(before.files), list(after.files)) == (["a.yaml"], ["b.yaml"])
    assert after.root != before.root


def test_linked_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "outside" / "b.yaml")
    root = tmp_path / "root"
    put(root / "real" / "a.yaml")
    (root / "real" / "up").symlink_to("..")
    (root / "alias").symlink_to("real")
    (root / "other").symlink_to(tmp_path / "outside")
    (root / "self").symlink_to("self")
    found = scan(root)
    assert found.complete
    assert sorted(found.files) == ["other/b.yaml", "real/a.yaml"]
    assert set(found.links) == {"alias", "other", "real/up", "self"}


def test_a_dangling_link_is_a_file_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("nowhere.yaml")
    (tmp_path / "team").symlink_to("/nowhere")
    found = scan(tmp_path)
    assert found.complete
    assert found.files["a.yaml"].fingerprint is None
    assert found.files["a.yaml"].dangling
    assert found.files["a.yaml"].error == "the link leads nowhere"
    assert found.dangling == ("team",)


def test_a_missing_root_is_an_outage_and_not_an_empty_directory(tmp_path: Path) -> None:
    found = scan(tmp_path / "desired")
    assert not found.complete
    assert found.root is None
    assert found.error == f"{tmp_path / 'desired'} does not exist"


def test_a_root_that_is_a_file_is_named_as_such(tmp_path: Path) -> None:
    found = scan(put(tmp_path / "desired"))
    assert not found.complete
    assert found.error == f"{tmp_path / 'desired'} is not a directory"


def test_an_unreadable_root_is_an_outage(fs: FakeFileSystem) -> None:
    fs.fail("/d", errno.EACCES)
    found = Scanner("/d", fs).scan()
    assert (found.complete, found.root) == (False, None)
    assert found.error == "/d cannot be read: Permission denied"


def test_an_unreadable_subdirectory_makes_the_scan_incomplete_and_the_rest_is_listed(
    fs: FakeFileSystem,
) -> None:
    fs.mkdir("/d/sub")
    fs.write("/d/a.yaml", b"x")
    fs.fail("/d/sub", errno.EACCES)
    found = Scanner("/d", fs).scan()
    assert not found.complete
    assert not found.torn
    assert list(found.files) == ["a.yaml"]
    assert found.unreadable == {"sub": "Permission denied"}
    assert found.error == "sub cannot be read: Permission denied"


@pytest.mark.parametrize("victim", ["/d/sub", "/d/z.yaml"])
def test_what_vanishes_during_the_scan_makes_it_torn(fs: FakeFileSystem, victim: str) -> None:
    fs.mkdir("/d/sub")
    fs.write("/d/a.yaml", b"x")
    fs.write("/d/z.yaml", b"x")

    def vanish(call: str, path: str) -> None:
        if call == "stat" and path == "/d/a.yaml":
            fs.delete(victim)

    fs.before = vanish
    found = Scanner("/d", fs).scan()
    assert (found.complete, found.torn) == (False, True)
    assert "a.yaml" in found.files
    assert found.error == f"{victim[3:]} vanished while it was being read"


def test_a_root_swapped_during_the_scan_makes_it_torn(fs: FakeFileSystem) -> None:
    fs.mkdir("/d2")
    fs.symlink("/d", "/current")
    fs.write("/d/a.yaml", b"x")
    fs.before = lambda call, path: (
        fs.symlink("/d2", "/current") if path == "/current/a.yaml" else None
    )
    found = Scanner("/current", fs).scan()
    assert (found.complete, found.torn) == (False, True)
    assert found.error == "/current was replaced while it was being read"


def test_a_scan_costs_one_listing_a_directory_and_one_stat_a_file(fs: FakeFileSystem) -> None:
    fs.mkdir("/d/sub")
    for name in ("a", "b", "sub/c"):
        fs.write(f"/d/{name}.yaml", b"x")
    Scanner("/d", fs).scan()
    assert fs.calls == {"list_dir": 2, "stat": 2 + 1 + 3, "read": 0}


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(directory)
    fs = FakeFileSystem()
    fs.mkdir("/d")
    fs.mkdir("/d/\udcff")
    fs.fail("/d/\udcff", errno.EACCES)
    error = Scanner("/d", fs).scan().error
    assert error is not None
    assert error.encode("utf-8").startswith(b"\\udcff cannot be read")
    assert scan(tmp_path).complete
