"""Which directories have to be watched, and on which file systems watching is no use."""

from __future__ import annotations

from pathlib import Path

from splitlearn_manager.desired.watch_plan import covering, plan_watches, unheard_file_system


def plan(root: Path, *others: Path) -> dict[str, set[str] | None]:
    watches = plan_watches(str(root), [str(other) for other in others])
    return {d: None if w.names is None else set(w.names) for d, w in watches.items()}


def test_a_plain_root_is_watched_whole_and_in_its_parent_for_its_name(tmp_path: Path) -> None:
    (tmp_path / "desired").mkdir()
    assert plan(tmp_path / "desired") == {
        str(tmp_path): {"desired"},
        str(tmp_path / "desired"): None,
    }


def test_each_hop_of_a_linked_root_is_watched(tmp_path: Path) -> None:
    git = tmp_path / "git"
    (git / "rev2").mkdir(parents=True)
    (git / "current").symlink_to("rev2")
    (tmp_path / "desired").symlink_to(git / "current")
    assert plan(tmp_path / "desired") == {
        str(tmp_path): {"desired"},
        str(git): {"current", "rev2"},
        str(git / "rev2"): None,
    }


def test_a_link_within_the_path_and_dots_in_its_target_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "l").symlink_to("../real/./deep/..")
    assert plan(tmp_path / "links" / "l" / "deep") == {
        str(tmp_path / "links"): {"l"},
        str(tmp_path / "real"): {"deep"},
        str(tmp_path / "real" / "deep"): None,
    }


def test_what_does_not_exist_is_watched_where_it_would_appear(tmp_path: Path) -> None:
    assert plan(tmp_path / "a" / "b") == {str(tmp_path): {"a"}}
    (tmp_path / "dead").symlink_to("gone/far")
    assert plan(tmp_path / "dead") == {str(tmp_path): {"dead", "gone"}}


def test_a_link_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert plan(tmp_path / "loop") == {str(tmp_path): {"loop"}}


def test_what_lies_below_a_watched_tree_needs_no_watch_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "desired"
    (root / "..1").mkdir(parents=True)
    (root / "..1" / "a.yaml").write_text("x")
    (root / "a.yaml").symlink_to("..1/a.yaml")
    (root / "models").mkdir()
    weights = tmp_path / "m.pt"
    weights.write_text("w")
    assert plan(root, root / "a.yaml", root / "models", weights) == {
        str(tmp_path): {"desired", "m.pt"},
        str(root): None,
    }


def test_covering_finds_the_watches_that_hear_of_what_is_needed() -> None:
    assert covering(["/a", "/b", "/a/b"], ["/a/b/c"]) == {"/a", "/a/b"}
    assert covering(["/ab"], ["/a"]) == set()


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /mnt/share rw - nfs4 server:/export rw
31 22 0:41 / /mnt/with\\040space rw shared:5 - cifs //server/x rw
32 22 0:42 / /mnt/s3 rw - fuse.s3fs s3fs rw
33 22 0:43 / /mnt/layers rw - fuse.fuse-overlayfs x rw
34 30 0:44 / /mnt/share/local rw - tmpfs tmpfs rw
not a mount
"""


def test_network_file_systems_are_told_by_the_mount_a_path_lies_on() -> None:
    kinds = {
        "/srv/desired": None,
        "/mnt/share": "nfs4",
        "/mnt/share/desired": "nfs4",
        "/mnt/shared": None,
        "/mnt/share/local/x": None,
        "/mnt/with space/x": "cifs",
        "/mnt/s3/desired": "fuse.s3fs",
        "/mnt/layers/x": None,
    }
    assert {path: unheard_file_system(path, MOUNTS) for path in kinds} == kinds
    assert unheard_file_system("/x", "") is None
