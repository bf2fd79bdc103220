"""For every situation that people ask about, the sentences that they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.desired.state import SourceRef
from splitlearn_manager.reconcile.actions import Waiting
from splitlearn_manager.reconcile.events import Event
from splitlearn_manager.reconcile.explain import explain, explain_conflict
from splitlearn_manager.reconcile.explanation import Explanation
from splitlearn_manager.reconcile.status import DeviceUse, Facts
from splitlearn_manager.runtime.base import Activations
from support.fakes import model
from support.status_lab import (
    ATTEMPT,
    GUARD,
    NEW,
    NO_PLACE,
    NO_ROOM,
    NODE,
    NOON,
    NOTHING,
    OLD,
    RETRY,
    SITUATIONS,
    other,
    view,
    wanted,
)

TRACEBACK = (
    "correct what the message says; with `log_level: DEBUG` in server.yaml, which applies at once, the "
    "next try logs the whole traceback"
)


ESTIMATED = "that is an estimate of its weights; a load measures what it takes"
MEASURED = Measurement("l", "w", "cpu", 95.0, 100.0, Activations(((4.0, 0.5),)))


def of(
    facts: Facts | str, others: Sequence[InstanceView] = (), events: Sequence[Event] = ()
) -> Explanation:
    known = SITUATIONS[facts] if isinstance(facts, str) else facts
    return explain(known, NODE, NOON, others, events)


# Waiting.


def test_pending_for_memory_names_who_holds_it_and_what_would_free_some() -> None:
    found = of(
        "waits for memory",
        [
            other("idle", mb=400),
            other("busy", mb=300, leases=2),
            other("fixed", mb=200, pinned=True),
            other("urgent", mb=50, priority=5),
            other("mine", mb=20, owner=Owner.API),
            replace(other("far", mb=900), device="cuda:0"),
        ],
    )
    assert found.headline == "m waits for memory"
    assert found.because == ("needs 10 MB on cpu", ESTIMATED)
    assert found.waits_for == "10 MB on cpu"
    assert found.would_help == (
        "a request for m: then idle (400 MB) may make room, last used before it",
        "the end of the requests that busy (300 MB) answers, and a request for m",
        "a priority of 5 in its file (it is 0), as that of urgent (50 MB)",
        "unpin what is needed less: fixed (200 MB)",
        "unload what was loaded through the Python API: mine (20 MB)",
        "raise memory_quota_mb of cpu, or max_memory_percent, in server.yaml: it applies at once",
        "remove the file of a model that is needed less",
    )


def test_pending_for_more_memory_than_there_is_says_that_waiting_does_not_help() -> None:
    found = of(replace(NOTHING, wanted=wanted(mb=2000.0), waiting=NO_ROOM), [other("a")])
    assert found.because[0] == (
        "it needs 2,000 MB, more than all models together may take: 1,000 MB on cpu"
    )
    assert found.headline == "m is too large for this node as it is set up"
    assert found.waits_for == "a larger budget"
    assert found.would_help == (
        "raise memory_quota_mb of cpu, or max_memory_percent, in server.yaml: it applies at once",
        "a smaller model, or its weights in a smaller dtype (`config.dtype`)",
    )


def test_pending_for_memory_says_what_its_last_load_measured() -> None:
    found = of(replace(NOTHING, wanted=wanted(mb=120.0, measured=MEASURED), waiting=NO_ROOM))
    assert found.because == (
        "needs 10 MB on cpu",
        "its last load measured 120 MB (100 MB of weights, 20 MB of activations for batches of 32)",
    )


def test_what_serves_says_what_it_takes_and_what_was_estimated() -> None:
    serves = view(State.READY, measured=MEASURED)
    assert (
        "it takes 120 MB (100 MB of weights, 20 MB of activations for batches of 32) on cpu; its weights "
        "were estimated at 95 MB"
    ) in of(replace(NOTHING, views=(serves,))).because


def test_pending_where_one_of_two_devices_would_do_is_no_matter_of_the_budget() -> None:
    node = replace(NODE, devices=(DeviceUse("cpu", 0.0, 5.0), DeviceUse("cuda:0", 0.0, 50.0)))
    facts = replace(NOTHING, wanted=wanted(devices=("cuda:0", "cpu")), waiting=NO_ROOM)
    assert explain(facts, node, NOON).waits_for == "10 MB on cuda:0 or cpu"


def test_pending_for_memory_that_a_hung_load_holds_says_so() -> None:
    found = of("waits for memory", [other("hangs", State.FAILED, mb=900)])
    assert found.would_help[0] == (
        "start the node anew: the loads of hangs (900 MB) hang and keep their room"
    )


def test_pending_for_more_than_all_idle_ones_hold_does_not_propose_that_they_go() -> None:
    """Seen: `a request for m: then idle (0 MB) may make room`, which it would not."""
    facts = replace(NOTHING, wanted=wanted(mb=800.0), waiting=NO_ROOM)
    found = of(facts, [other("idle", mb=100), other("fixed", mb=800, pinned=True)])
    assert found.would_help[0] == "unpin what is needed less: fixed (800 MB)"
    assert not [help for help in found.would_help if "idle" in help]


def test_pending_for_max_models() -> None:
    found = of(
        replace(NOTHING, waiting=NO_PLACE), [other("a", pinned=True), other("b", pinned=True)]
    )
    assert found.headline == "m waits for a place: max_models are loaded"
    assert found.because == (NO_PLACE.message,)
    assert found.waits_for == "a place under max_models"
    assert found.would_help == (
        "unpin what is needed less: a (500 MB), b (500 MB)",
        "raise max_models (it is 2) in server.yaml: it applies at once",
        "remove the file of a model that is needed less",
    )


def test_many_holders_are_counted() -> None:
    found = of("waits for memory", [other(f"p{n}", mb=n, pinned=True) for n in range(1, 8)])
    assert "unpin what is needed less: p7 (7 MB), p6 (6 MB), p5 (5 MB), p4 (4 MB) and 3 more" in (
        found.would_help
    )


def test_waiting_for_a_turn_names_what_is_loaded_meanwhile() -> None:
    found = of("waits for its turn", [other("b", State.LOADING), other("a", State.LOADING)])
    assert found.headline == "m waits for its turn to be loaded"
    assert found.because == (
        "2 models may be loaded at a time",
        "being loaded at this moment: a, b",
    )
    assert found.waits_for == "a load that is under way to end, or to take longer than 30 s"
    assert found.would_help == (
        "a higher priority in its file",
        "raise max_parallel_loads in server.yaml",
    )


def test_waiting_for_memory_that_comes_back_needs_nobody() -> None:
    found = of("waits for memory on its way back")
    assert found.headline == "m waits for memory that is on its way back"
    assert found.because == ("waits for the memory of a",)
    assert found.would_help == ()


def test_waiting_for_a_device() -> None:
    found = of("waits for its device")
    assert found.headline == "m waits for a device that this node does not have"
    assert found.would_help == (
        "let `device` name one that this node has, or write `device: auto`",
    )


def test_what_comes_next_says_where_it_comes_from() -> None:
    found = of("comes next")
    assert found.headline == "m is loaded next"
    assert found.because == ("generation 2 was accepted from m.yaml:3",)


def test_declared_anew_while_its_old_copy_goes() -> None:
    found = of("is declared anew while its old copy goes")
    assert found.headline == "m is loaded anew when its old copy is gone"
    assert found.waits_for == "its memory to be back"


def test_an_unknown_wait_is_told_as_it_is() -> None:
    found = of(
        replace(NOTHING, waiting=Waiting("m", "SomethingNew", "of which nobody knows", 1009.0))
    )
    assert found.headline == "m waits (SomethingNew)"
    assert (found.because, found.waits_for) == (("of which nobody knows",), "12:00:09")


# Its files.


def test_weights_missing() -> None:
    found = of("its files are missing")
    assert found.headline == "m cannot be loaded: WeightsNotFound"
    assert found.because == ("WeightsNotFound: nothing is at /models/m.pt",)
    assert found.waits_for == "its files to be there"
    assert found.would_help == (
        "put the files there, or correct model_path: a relative one starts at the YAML file",
    )


def test_weights_that_still_change() -> None:
    found = of("its files still change")
    assert found.headline == "m waits for its files, which are still changing"
    assert found.waits_for == "its files to stay the same for settle_s"
    assert found.would_help == ("finish copying them",)


# Evicted.


def test_evicted_for_room() -> None:
    event = Event(1, NOON.wall_s - 60, "m", "MadeRoom", "evicted: MadeRoom")
    found = of("was evicted", events=[event])
    assert found.headline == "m is parked: the next request brings it back"
    assert found.because == (
        "it was unloaded at 11:59:00 to make room for another model",
        "without requests nothing is swapped",
    )
    assert found.waits_for == "a request for m"
    assert found.would_help == (
        "a request for m: it waits until the model is loaded",
        "a higher priority or `pinned: true` in its file, or more room in server.yaml",
    )


def test_evicted_when_idle_names_its_endpoint_too() -> None:
    spec = ModelSpec.of(model("m", keep_alive_s=60.0, endpoint="chat"), generation=2)
    event = Event(1, NOON.wall_s, "m", "Idle", "evicted: Idle")
    found = of(replace(SITUATIONS["was evicted"], wanted=wanted(spec)), events=[event])
    assert found.because[0] == "it was unloaded at 12:00:00, idle for keep_alive_s = 60 s"
    assert found.waits_for == "a request for m or chat"
    assert found.would_help[1] == "a longer keep_alive_s, or `pinned: true`, in its file"


# Failed.


def test_evicted_and_asked_for_tells_what_it_waits_for_now() -> None:
    """Seen: `waits for a request for m`, after a request had come and found no place."""
    found = of(replace(NOTHING, parked=True, waiting=NO_PLACE), [other("a", pinned=True)])
    assert found.phase == "Evicted"
    assert found.headline == "m waits for a place: max_models are loaded"
    assert found.waits_for == "a place under max_models"


def test_failed_and_retrying_tells_tries_and_the_next_one() -> None:
    found = of("failed and is tried again")
    assert found.headline == "m could not be loaded in 3 tries; it is tried again at 12:00:09"
    assert found.because == (
        "LoadFailed: it is broken",
        "the pauses between tries grow up to a minute",
    )
    assert found.waits_for == "the next try at 12:00:09, or a change of its file or its weights"
    assert found.would_help == (
        TRACEBACK,
        "`retry m` tries it at once",
    )


def test_failed_and_due_waits_for_its_turn() -> None:
    found = of("failed and waits for its turn")
    assert found.headline == "m could not be loaded in 3 tries: LoadFailed"
    assert found.because == ("LoadFailed: it is broken", "it is tried again when its turn comes")
    assert found.waits_for == "its turn"


def test_failed_for_good() -> None:
    found = of("failed for good")
    assert found.headline == "m could not be loaded once, and trying again would not help"
    assert found.because == ("UntrustedCheckpoint: m.pt would run code",)
    assert found.waits_for == "a change of its file or its weights"
    assert found.would_help == (
        "save it as safetensors or as a state dict, or write `trusted: true` if you trust where it "
        "comes from",
    )


def test_sure_to_fail() -> None:
    found = of("is sure to fail")
    assert found.headline == "m cannot be loaded: OverMemoryLimit"
    assert found.waits_for == "a change of its file or its weights"
    assert found.would_help == ("raise max_memory_mb in its file, or use a smaller model",)


def test_rate_limited_does_not_propose_another_try() -> None:
    found = of("failed too often")
    assert (
        found.headline == "m failed too often and is not tried before 12:00:42, whoever asks for it"
    )
    assert found.because == (
        "10 loads failed within a minute",
        "its last load: LoadFailed: it is broken",
    )
    assert found.waits_for == "the limit on failed loads"
    assert found.would_help == (TRACEBACK,)


def test_rate_limited_in_an_older_version_says_what_to_correct_too() -> None:
    facts = SITUATIONS["failed too often"]
    attempt = replace(facts.attempt, spec=OLD) if facts.attempt is not None else None
    found = of(replace(facts, attempt=attempt))
    assert found.would_help == (TRACEBACK,)


def test_a_load_that_hangs() -> None:
    found = of("its load hangs")
    assert found.headline == "m could not be loaded once: its load hangs"
    assert found.because == (
        "LoadTimeout: not loaded in 1 s",
        "a load of generation 2 was given up and has not returned; it keeps 10 MB on cpu until it does",
    )
    assert found.waits_for == "its loader to return, or a change of its file or its weights"
    assert found.would_help[-1] == "start the node anew: a load that hangs cannot be stopped"


def test_a_reason_that_nobody_thought_of_is_told_with_its_message() -> None:
    facts = replace(
        NOTHING,
        attempt=replace(ATTEMPT, reason="Surprise", message="who knew"),
        waiting=replace(RETRY, reason="Surprise", message="who knew"),
    )
    found = of(facts)
    assert found.because[0] == "Surprise: who knew"
    assert found.would_help[0] == "correct what the message says"


# Served, and the file is not followed.


def test_conflict() -> None:
    found = of("serves while it is in conflict")
    assert found.headline == "m goes on serving generation 2: it is declared more than once"
    assert found.because[0] == "declared more than once: a.yaml:1 and m.yaml:3"
    assert found.waits_for == "all of its declarations but one to go"
    assert found.would_help == ("keep one of them",)


def test_conflict_of_an_id_that_was_never_accepted() -> None:
    found = explain_conflict("x", (SourceRef("a.yaml", 1), SourceRef("b.yaml", 2)))
    assert found.phase == "Pending"
    assert found.headline == "x is not accepted: it is declared more than once"
    assert found.because == (
        "declared in a.yaml:1 and b.yaml:2: which of them is meant cannot be told",
    )
    assert found.would_help == (
        "keep one of a.yaml:1 and b.yaml:2; remove the others, or give them other ids",
    )


def test_an_invalid_file_keeps_the_last_good_spec() -> None:
    found = of("serves while its file is invalid")
    assert found.headline == (
        "m goes on serving generation 2: its file is invalid, and this is the last good spec"
    )
    assert found.because[0] == 'm.yaml:7:16  max_memory_mb: expected an integer, got "4gb"'
    assert (found.waits_for, found.would_help) == ("a valid file", ("correct the file",))


def test_an_invalid_file_of_a_model_that_waits_is_told_beside_the_wait() -> None:
    invalid = SITUATIONS["serves while its file is invalid"]
    found = of(replace(invalid, views=(), waiting=NO_ROOM))
    assert found.headline == "m waits for memory"
    assert found.because == (
        'm.yaml:7:16  max_memory_mb: expected an integer, got "4gb"',
        "needs 10 MB on cpu",
        ESTIMATED,
    )
    assert found.would_help[0] == "correct the file"


def test_the_prune_guard_gives_both_ways_out() -> None:
    facts = SITUATIONS["serves while the prune guard holds it"]
    found = explain(facts, replace(NODE, prune_guard=GUARD), NOON)
    assert found.headline == (
        "m goes on serving generation 2: no file declares it, but too many models would go at once"
    )
    assert found.waits_for == "a confirmation, or its file"
    assert found.would_help == (
        "to keep it, put its file back",
        "to let it go, with all that went with it: `splitlearn-manager reconcile apply /desired "
        "--confirm-prune 3f1c0a9be2d4`",
    )
    assert found.because[0] == ("no file declares it, but 3 of 4 models would be unloaded at once")
    spaced = replace(NODE, prune_guard=GUARD, info=replace(NODE.info, directory="/my models"))
    assert " apply '/my models' --confirm-prune " in explain(facts, spaced, NOON).would_help[1]


def test_suspended() -> None:
    found = of("serves while it is suspended")
    assert found.headline == "m goes on serving generation 2: it is suspended"
    assert found.because[0] == "it is suspended: edits of its file and its removal wait"
    assert (found.waits_for, found.would_help) == ("`resume`", ("`resume m` ends that",))


def test_suspended_and_failed_is_not_tried_again() -> None:
    found = of("failed while it is suspended")
    assert found.headline == "m could not be loaded in 3 tries: LoadFailed"
    assert "it is not tried again while it is suspended" in found.because
    assert found.waits_for == "`resume`"
    assert found.would_help[0] == "`resume m` ends that"


def test_source_unavailable() -> None:
    found = of("serves while the directory is away")
    assert found.headline == (
        "m goes on serving generation 2: the desired directory cannot be read"
    )
    assert found.because[0] == "/desired does not exist"
    assert found.waits_for == "the directory to be readable"
    assert found.would_help == ("bring the directory back, mounted and readable",)


def test_a_file_in_doubt_needs_nobody() -> None:
    found = of("serves while its file is in doubt")
    assert found.headline == "m goes on serving generation 2: what its file says is in doubt"
    assert found.because[0] == "m.yaml is still changing"
    assert found.would_help == ()


# Updates.


def test_updating_by_surge() -> None:
    found = of("is updated by surge")
    assert found.headline == (
        "m is being updated: generation 1 serves while generation 2 is loaded beside it"
    )
    assert found.because == (
        "it is loaded on cpu since 11:59:58, and takes over once it has been tried: no request fails",
    )
    assert found.waits_for == "the load, which is given up at 12:09:58 (load_timeout_s = 600)"


def test_a_version_that_is_tried_is_not_said_to_load() -> None:
    """Seen to fail, with a time at which a rollout would be given up, when it is told as a load."""
    trial = "canary: step 1 of 2, 5 % of the requests"
    views = (view(State.READY, OLD), view(State.LOADING, NEW, trial=trial))
    found = of(replace(NOTHING, wanted=wanted(NEW), views=views))
    assert found.headline == "m is being rolled out: generation 2 is tried beside generation 1"
    assert found.because == (trial, "it was asked 3 requests, of which 1 failed")
    assert (
        found.waits_for == "its steps, each of which takes for_s and min_requests answered requests"
    )
    assert found.would_help == (
        "`promote m` lets it take over at once",
        "`abort m` takes it back",
    )


def test_a_rollout_whose_old_version_finds_no_room_says_so_and_what_would_help() -> None:
    """Seen to fail, with the room that the new version needs, when that is what is explained."""
    rules = {"canary": [{"percent": 5, "for_s": 60}]}
    new = ModelSpec.of(model("m", trusted=True, rollout=rules), weights="w0", generation=2)
    message = "generation 1, which served last, is loaded first: needs 60 MB on cpu"
    waits = replace(
        NOTHING,
        wanted=wanted(new, 10.0),
        fallback=wanted(OLD, 60.0),
        waiting=Waiting("m", "InsufficientMemory", message),
    )
    found = of(waits)
    assert (found.headline, found.waits_for) == ("m waits for memory", "60 MB on cpu")
    assert found.because[0] == message
    assert found.would_help[-1] == (
        "without `rollout` in its file generation 2 is loaded in its place"
    )
    small = replace(NODE, devices=(DeviceUse("cpu", 0.0, 40.0),))
    found = explain(waits, small, NOON)
    assert found.headline == "m is too large for this node as it is set up"
    assert found.because[0] == "generation 1, which served last, is loaded first"


def test_new_weights_are_named_as_what_they_are() -> None:
    coming = ModelSpec.of(model("m"), weights="w1", generation=1)
    views = (view(State.READY, OLD), view(State.LOADING, coming))
    found = of(replace(NOTHING, wanted=wanted(coming), views=views))
    assert found.headline == (
        "m is being updated: generation 1 serves while the version with new weights is loaded beside it"
    )


def test_updating_by_recreate() -> None:
    found = of("is updated by recreate")
    assert found.headline == "m is being updated to generation 2: the old version goes first"
    assert found.because == (
        "both do not fit at once",
        "it is being unloaded",
        "nothing serves it until the new version does",
    )
    asked = ModelSpec.of(model("m", trusted=True, update="recreate"), weights="w0", generation=2)
    again = of(replace(SITUATIONS["is updated by recreate"], wanted=wanted(asked)))
    assert again.because[0] == "as its file asks for (update: recreate)"


def test_an_update_that_waits_for_room_proposes_nothing_that_evicts() -> None:
    found = of(
        "serves the old version until there is room", [other("idle"), other("b", pinned=True)]
    )
    assert found.headline == (
        "m serves generation 1; the update to generation 2 waits (InsufficientMemory)"
    )
    assert found.would_help == (
        "raise memory_quota_mb of cpu, or max_memory_percent, in server.yaml: it applies at once",
        "remove the file of a model that is needed less",
    )
    spec = ModelSpec.of(model("m", trusted=True, update="surge"), weights="w0", generation=2)
    surge = replace(SITUATIONS["serves the old version until there is room"], wanted=wanted(spec))
    assert of(surge).would_help[0] == (
        "write `update: auto`: then the old version goes first where both do not fit"
    )


def test_an_update_that_comes_next() -> None:
    found = of(replace(NOTHING, views=(view(State.READY, OLD),)))
    assert found.headline == (
        "m is about to be updated to generation 2; generation 1 goes on serving"
    )


def test_update_failed_while_the_old_version_serves() -> None:
    found = of("serves the old version after a failed update")
    assert found.headline == "m: the update to generation 2 failed; generation 1 goes on serving"
    assert found.because[0] == "LoadFailed: it is broken"
    assert found.waits_for == "the next try at 12:00:09, or a change of its file or its weights"


def test_an_update_that_would_be_an_outage_is_not_tried_again_by_itself() -> None:
    found = of("serves the old version and is not tried again")
    assert found.headline == "m: the update to generation 2 failed; generation 1 goes on serving"
    assert found.because == (
        "LoadFailed: it is broken",
        "there is no room for two versions: each try of the update is an outage",
    )
    assert found.would_help[-1] == "room for both versions: then a try costs nothing"


def test_a_failed_update_by_recreate_is_not_blamed_on_room() -> None:
    spec = ModelSpec.of(model("m", trusted=True, update="recreate"), weights="w0", generation=2)
    facts = replace(
        SITUATIONS["serves the old version and is not tried again"],
        wanted=wanted(spec),
        attempt=replace(ATTEMPT, spec=spec),
    )
    found = of(facts)
    assert (
        "its file asks for `update: recreate`: each try of the update is an outage" in found.because
    )
    assert found.would_help[-1] == (
        "`update: auto` or `surge` in its file, with room for both versions: then a try costs nothing"
    )


def test_going_back_after_a_failed_update() -> None:
    found = of("goes back after a failed update")
    assert found.headline == "m goes back to generation 1: generation 2 could not be loaded"
    assert found.because[:2] == (
        "LoadFailed: it is broken",
        "being loaded on cpu since 11:59:58",
    )


# Under way, or well.


def test_loading() -> None:
    found = of(replace(SITUATIONS["loads"], attempt=replace(ATTEMPT, failures=1)))
    assert found.headline == "m is being loaded: generation 2 on cpu since 11:59:58"
    assert found.because == (
        "10 MB are reserved for it",
        "it could not be loaded once before: LoadFailed: it is broken",
    )
    assert found.waits_for == "the load, which is given up at 12:09:58 (load_timeout_s = 600)"


def test_terminating_counts_the_requests_that_it_drains() -> None:
    found = of("is declared no more")
    assert found.headline == "m is being unloaded: no file declares it"
    assert found.because == (
        "it takes no new requests and is unloaded when 3 running requests have ended",
    )
    assert found.waits_for == "3 running requests to end"
    assert found.would_help == ("to keep it, put its file back",)


def test_terminating_for_too_long_says_that_requests_are_not_cut_off() -> None:
    late = view(State.UNLOADING, leases=1, drain_overdue=True)
    found = of(replace(SITUATIONS["is declared no more"], views=(late,)))
    assert found.because == (
        "it takes no new requests and is unloaded when 1 running request has ended, which takes "
        "longer than drain_timeout_s already",
        "running requests are never cut off",
    )
    assert found.waits_for == "1 running request to end"


def test_settled_and_well() -> None:
    found = of("serves")
    assert found.headline == "m is well: generation 2 serves on cpu, as declared"
    assert found.because == (
        "generation 2 was accepted from m.yaml:3",
        "3 requests answered, 0 running",
    )
    assert (found.waits_for, found.would_help) == (None, ())


def test_well_until_it_is_idle() -> None:
    assert of("serves until it is idle").because[-1] == (
        "unloaded when idle for keep_alive_s = 60 s: at 12:01:00 unless a request comes before"
    )


def test_well_while_the_version_before_drains() -> None:
    assert of("old one drains after a surge").because[-1] == (
        "the version before it: it takes no new requests and is unloaded when 2 running requests "
        "have ended"
    )


def test_loaded_through_the_api() -> None:
    found = of("was loaded through the Python API")
    assert found.headline == "m is well: it serves on cpu"
    assert (
        found.because[0] == "it was loaded through the Python API: the directory never touches it"
    )


@pytest.mark.parametrize(
    ("state", "headline"),
    [
        (State.LOADING, "m is being loaded on cpu since 11:59:58"),
        (State.UNLOADING, "m is being unloaded"),
        (State.FAILED, "m could not be loaded, and what its load holds is not back"),
    ],
)
def test_of_the_api_in_every_state(state: State, headline: str) -> None:
    of_api = SITUATIONS["was loaded through the Python API"]
    found = of(replace(of_api, views=(view(state, owner=Owner.API),)))
    assert found.headline == headline
    assert found.waits_for


def test_taken_by_the_api() -> None:
    found = of("is taken by the Python API")
    assert found.headline == (
        "m is not loaded from its file: a model of that id was loaded through the Python API"
    )
    assert found.would_help == (
        "unload it where it was loaded: `unload_model('m')`",
        "give the model in the file another model_id",
    )
