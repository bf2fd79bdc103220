"""The record on the disk: what was written is read, and nothing that is found there ends a start."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.desired.state import DesiredModel, SourceRef
from splitlearn_manager.reconcile.record import HistoryEntry, ModelRecord, Record
from splitlearn_manager.reconcile.store import NODE, DirectoryFiles, Store, shard_of
from splitlearn_manager.runtime.base import Activations, Joining
from support.fakes import MemoryFiles, model

OF = {"load_hash": "l", "weights": "w", "device": "cpu"}


class Died(BaseException):
    """The process ends here."""


def record_of(model_id: str, **keys: object) -> ModelRecord:
    config = model(model_id, **keys).with_base_dir("/desired/sub")
    return ModelRecord(
        accepted=DesiredModel(
            config=config,
            generation=3,
            spec_hash=config.spec_hash(),
            load_hash=config.load_hash(),
            source=SourceRef(f"sub/{model_id}.yaml", 4),
            weights="w1",
        ),
        history=(
            HistoryEntry(3, 1_700_000_000.5, "priority 0 → 1", f"sub/{model_id}.yaml:4", "Ready"),
        ),
    )


def of(*model_ids: str, **keys: object) -> Record:
    return Record({model_id: record_of(model_id, **keys) for model_id in model_ids})


def without(record: Record, *model_ids: str) -> Record:
    return replace(record, models={m: r for m, r in record.models.items() if m not in model_ids})


def saved(*records: Record) -> MemoryFiles:
    files = MemoryFiles()
    store = Store(files)
    for record in records:
        store.save(record)
    return files


def loaded(files: MemoryFiles) -> Record:
    record, complaints = Store(files).load()
    assert complaints == ()
    return record


def in_different_files(count: int) -> list[str]:
    """So many ids of which no two are kept in one file."""
    found: dict[str, str] = {}
    number = 0
    while len(found) < count:
        found.setdefault(shard_of(f"m{number}"), f"m{number}")
        number += 1
    return sorted(found.values())


def in_one_file(count: int) -> list[str]:
    place, found, number = shard_of("m0"), list[str](), 0
    while len(found) < count:
        if shard_of(f"m{number}") == place:
            found.append(f"m{number}")
        number += 1
    return found


def test_what_was_saved_is_loaded() -> None:
    kept = record_of("a", priority=1, config={"kwargs": {"value": 2.5}})
    served = ModelSpec.of(
        model("a", priority=9).with_base_dir("/desired"), weights="w0", generation=2
    )
    full = replace(
        kept,
        served=served,
        suspended=True,
        measured=(
            Measurement("l0", "w0", "cpu", None, 80.5, joining=Joining(True, "they may")),
            Measurement(
                "l2", "w2", "cpu", None, 80.5, joining=Joining(True, "all may", lengths=True)
            ),
            Measurement("l1", "w1", "cuda:0", 90.0, 90.25, Activations(((1.0, 0.1), (-2.0, 0.4)))),
        ),
        accepted=replace(
            kept.accepted, guarded=True, claimed_by=(SourceRef("x.yaml", 1), SourceRef("y.yaml", 2))
        ),
    )
    record = Record({"a": full, "b": record_of("b")}, confirmed_prune="0123456789ab")
    found = loaded(saved(record))
    assert found == record
    assert found.models["a"].accepted.config.base_dir == Path("/desired/sub")
    assert found.models["a"].served is not None
    assert found.models["a"].served.config.base_dir == Path("/desired")


@pytest.mark.parametrize(
    "measured",
    [
        [{**OF, "estimated_mb": None}],
        [{**OF, "estimated_mb": None, "weights_mb": -1.0}],
        [{**OF, "estimated_mb": float("nan"), "weights_mb": 1.0}],
        [
            {
                **OF,
                "estimated_mb": 1.0,
                "weights_mb": 1.0,
                "activations_mb": [[1.0, float("inf")]],
            }
        ],
        ["no measurement"],
    ],
)
def test_a_measurement_that_is_none_is_done_without_and_costs_no_model(measured: object) -> None:
    files = saved(of("a"))
    data = json.loads(files.held[shard_of("a")])
    data["models"]["a"]["measured"] = measured
    files.held[shard_of("a")] = json.dumps(data).encode()
    record, complaints = Store(files).load()
    assert record == of("a")
    assert complaints == ()


def test_what_an_older_version_wrote_has_no_measurements() -> None:
    files = saved(
        Record({"a": replace(record_of("a"), measured=(Measurement("l", "w", "cpu", 1, 1),))})
    )
    data = json.loads(files.held[shard_of("a")])
    del data["models"]["a"]["measured"]
    files.held[shard_of("a")] = json.dumps(data).encode()
    assert loaded(files) == of("a")


def test_what_an_older_version_did_not_ask_of_joining_is_found_out_anew() -> None:
    measured = Measurement("l", "w", "cpu", 1, 1, joining=Joining(True, "they may"))
    files = saved(Record({"a": replace(record_of("a"), measured=(measured,))}))
    data = json.loads(files.held[shard_of("a")])
    del data["models"]["a"]["measured"][0]["joining"]["lengths"]
    files.held[shard_of("a")] = json.dumps(data).encode()
    assert loaded(files).models["a"].measured == (replace(measured, joining=None),)


def test_what_was_said_of_a_moment_is_not_kept() -> None:
    kept = record_of("a")
    now = replace(
        kept, accepted=replace(kept.accepted, held="is changing", accepted_at=5.0, seen_at=4.0)
    )
    assert loaded(saved(Record({"a": now}))).models["a"] == kept


def test_one_edit_writes_one_file_and_none_writes_nothing() -> None:
    files = MemoryFiles()
    store = Store(files)
    before = of(*(f"m{number}" for number in range(200)))
    store.save(before)
    files.log.clear()
    store.save(replace(before, models=dict(before.models)))
    held = replace(before.models["m7"].accepted, held="is changing", accepted_at=9.0)
    store.save(
        replace(before, models={**before.models, "m7": replace(before.models["m7"], accepted=held)})
    )
    assert files.log == []
    store.save(replace(before, models={**before.models, "m7": record_of("m7", priority=4)}))
    assert files.log == [shard_of("m7")]


def test_a_start_knows_what_is_there_and_writes_nothing_anew() -> None:
    files = saved(of("a", "b", "c"))
    files.log.clear()
    store = Store(files)
    record, _ = store.load()
    assert not store.pending
    store.save(record)
    assert files.log == []


def test_a_model_that_is_gone_leaves_no_file_behind() -> None:
    assert saved(of("a"), Record()).held.keys() <= {NODE}


def test_people_find_one_model_a_line() -> None:
    ids = in_one_file(3)
    lines = saved(of(*ids)).held[shard_of(ids[0])].decode().splitlines()
    assert [line.split('"')[1] for line in lines if '"generation"' in line] == sorted(ids)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\0" * 100,
        b'{"version": 1, "mod',
        b"[]",
        b"{}",
        b'{"version": "1"}',
        b'{"version": 1, "models": []}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_reported_set_aside_and_done_without(damage: bytes) -> None:
    one, other = in_different_files(2)
    files = saved(of(one, other))
    files.held[shard_of(one)] = damage
    store = Store(files)
    record, complaints = store.load()
    assert record.models.keys() == {other}
    assert [c.split(":")[0] for c in complaints] == [shard_of(one)]
    assert store.pending
    store.save(record)
    assert files.held[f"{shard_of(one)}.unreadable"] == damage
    assert shard_of(one) not in files.held
    assert loaded(files) == record


@pytest.mark.parametrize(
    "change",
    [
        {"generation": "three"},
        {"source": "a.yaml"},
        {"config": {"model_id": "m0"}},
        {"config": {"model_id": "m0", "model_path": "/m.pt", "no_such_key": 1}},
        {"config": {"model_id": "other", "model_path": "/m.pt"}},
        {"history": [{"generation": 1}]},
        {"served": {"generation": 1}},
    ],
)
def test_a_model_that_cannot_be_read_takes_no_other_with_it(change: dict[str, object]) -> None:
    broken, well = in_one_file(2)
    files = saved(of(broken, well))
    data = json.loads(files.held[shard_of(broken)])
    data["models"][broken].update(change)
    files.held[shard_of(broken)] = json.dumps(data).encode()
    record, complaints = Store(files).load()
    assert record.models.keys() == {well}
    assert len(complaints) == 1
    assert repr(broken) in complaints[0]


def test_a_file_of_a_newer_version_is_reported_and_left_alone() -> None:
    one, other = in_different_files(2)
    files = saved(of(one, other))
    newer = b'{"version": 2, "models": "in a way of its own"}'
    files.held[shard_of(one)] = newer
    store = Store(files)
    record, complaints = store.load()
    assert record.models.keys() == {other}
    assert "newer version" in complaints[0]
    assert store.left_alone == {shard_of(one)}
    store.save(of(one, other, priority=7))
    store.save(Record())
    assert files.held[shard_of(one)] == newer
    assert not store.pending


def test_an_unreadable_file_is_reported_and_written_anew() -> None:
    one, other = in_different_files(2)
    files = saved(of(one, other))
    files.unreadable.add(shard_of(one))
    store = Store(files)
    record, complaints = store.load()
    assert record.models.keys() == {other}
    assert "Input/output error" in complaints[0]
    files.unreadable.clear()
    store.save(of(one, other))
    assert loaded(files) == of(one, other)


def test_a_full_disk_leaves_the_old_record_and_the_next_save_writes_the_new_one() -> None:
    files = MemoryFiles()
    store = Store(files)
    store.save(of("a", "b"))
    files.error = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        store.save(of("a", "b", priority=1))
    assert loaded(files) == of("a", "b")
    files.error = None
    store.save(of("a", "b", priority=1))
    assert loaded(files) == of("a", "b", priority=1)


def test_one_file_that_cannot_be_written_keeps_no_other_from_being_written() -> None:
    one, two, three = in_different_files(3)
    files = MemoryFiles()
    store = Store(files)

    def refuse(name: str) -> None:
        if name == shard_of(two):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), name)

    files.before = refuse
    with pytest.raises(OSError, match="Is a directory"):
        store.save(of(one, two, three))
    assert loaded(files).models.keys() == {one, three}


def test_deleted_files_are_noticed_and_written_anew() -> None:
    files = MemoryFiles()
    store = Store(files)
    record = replace(of("a", "b", "c"), confirmed_prune="0123456789ab")
    store.save(record)
    store.recheck()
    assert not store.pending
    files.held.clear()
    store.recheck()
    assert store.pending
    store.save(record)
    assert loaded(files) == record
    assert not store.pending


def test_what_a_dead_writer_left_behind_is_removed() -> None:
    files = saved(of("a"))
    files.held[".models-07.json.123.abcd.tmp"] = b"half"
    store = Store(files)
    store.load()
    assert files.held.keys() > {shard_of("a")}
    store.recheck()
    assert files.held.keys() == {shard_of("a")}


def crashes_during(before: Record, after: Record) -> Iterable[tuple[int, MemoryFiles]]:
    """The disk as it is when the process dies at each write on the way from one record to the other."""
    moment = 0
    while True:
        files = saved(before)
        store = Store(files)
        store.load()
        left = [moment]

        def die(name: str, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Died
            left[0] -= 1

        files.before = die
        try:
            store.save(after)
        except Died:
            files.before = lambda name: None
            yield moment, files
            moment += 1
        else:
            return


def test_models_leave_together_whenever_the_process_dies() -> None:
    """Seen to fail with the ids that leave not named before the first of their files is written."""
    ids = in_different_files(5)
    before = replace(of(*ids), confirmed_prune="0123456789ab")
    after = without(replace(before, confirmed_prune=""), *ids[:3])
    seen = []
    for moment, files in crashes_during(before, after):
        record = loaded(files)
        assert record in (before, after), f"died at write {moment}"
        seen.append(record.models.keys() == after.models.keys())
        # What is left to do is done by the next start, and a model that comes back is believed.
        store = Store(files)
        store.load()
        store.save(before)
        assert loaded(files) == before
    assert seen == sorted(seen)
    assert {True, False} == set(seen)


def test_each_model_is_old_or_new_whenever_the_process_dies() -> None:
    ids = in_different_files(4)
    before, after = of(*ids), of(*ids, priority=5)
    for _, files in crashes_during(before, after):
        found = loaded(files)
        assert found.models.keys() == set(ids)
        for model_id, kept in found.models.items():
            assert kept in (before.models[model_id], after.models[model_id])


def test_what_was_kept_for_another_directory_is_done_without() -> None:
    files = MemoryFiles()
    Store(files, "/srv/a").save(of("a", "b"))
    store = Store(files, "/srv/b")
    record, complaints = store.load()
    assert record == Record()
    assert "/srv/a, not of /srv/b" in complaints[0]
    store.save(of("c"))
    assert Store(files, "/srv/b").load() == (of("c"), ())
    assert Store(files, "/srv/a").load()[0] == Record()


def test_on_the_disk_the_directory_is_made_when_it_is_needed_and_is_its_users_alone(
    tmp_path: Path,
) -> None:
    place = tmp_path / "state" / "record"
    files = DirectoryFiles(place)
    assert files.names() == []
    files.remove("a.json")
    assert not place.exists()
    store = Store(files)
    store.save(of("a"))
    assert Store(DirectoryFiles(place)).load() == (of("a"), ())
    assert place.stat().st_mode & 0o077 == 0


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "record").write_text("a file where the directory should be")
    with pytest.raises(OSError) as caught:
        DirectoryFiles(tmp_path / "record").write("models-00.json", b"")
    assert caught.value.filename == str(tmp_path / "record" / "models-00.json")
