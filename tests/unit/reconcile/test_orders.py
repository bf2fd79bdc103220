"""What people ask of the loop: when it is done, what is answered, what is refused."""

from __future__ import annotations

import pytest

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.desired.state import DesiredModel, DesiredState, PruneGuard, SourceRef
from splitlearn_manager.errors import ModelNotFound, SplitlearnError
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.orders import Orders
from support.fakes import model

DIGEST = "0123456789ab"


def declared(*model_ids: str, **fields: object) -> DesiredState:
    models = {}
    for model_id in model_ids:
        config = model(model_id)
        models[model_id] = DesiredModel(
            config, 4, config.spec_hash(), config.load_hash(), SourceRef("a.yaml", 1)
        )
    return DesiredState(
        models=models,
        source_available=True,
        complete=True,
        **fields,  # type: ignore[arg-type]
    )


def guarded(*model_ids: str, digest: str = DIGEST) -> DesiredState:
    guard = PruneGuard(digest, model_ids, len(model_ids) + 1)
    return declared(*model_ids, "stays", prune_guard=guard)


def orders_after(desired: DesiredState) -> Orders:
    orders = Orders()
    orders.looked(desired, "")
    return orders


def failed(model_id: str, failures: int = 3) -> Attempt:
    return Attempt(ModelSpec.of(model(model_id)), failures, 1.0, "LoadFailed", "it is broken")


def test_suspending_and_resuming_say_what_follows() -> None:
    orders = orders_after(declared("a"))
    assert "stays at generation 4" in orders.suspend("a")
    assert "already" in orders.suspend("a")
    assert orders.suspended == {"a"}
    assert "its files count again" in orders.resume("a")
    assert "not suspended" in orders.resume("a")
    assert orders.suspended == frozenset()


def test_what_no_file_declares_cannot_be_asked_for() -> None:
    orders = orders_after(declared("a"))
    for ask in (orders.suspend, orders.resume, lambda m: orders.retry(m, None, None)):
        with pytest.raises(ModelNotFound, match="'b'"):
            ask("b")


def test_a_model_that_is_not_decided_about_yet_can_be_suspended() -> None:
    state = declared("a")
    orders = orders_after(DesiredState(undecided=state.models))
    orders.suspend("a")
    orders.looked(state, "")
    assert orders.suspended == {"a"}


def test_a_suspension_ends_with_the_model() -> None:
    orders = orders_after(declared("a", "b"))
    orders.suspend("a")
    orders.looked(declared("b"), "")
    assert orders.suspended == frozenset()


def test_a_suspension_that_was_restored_waits_for_the_directory_to_be_known() -> None:
    orders = Orders()
    orders.restore(["a"], "")
    orders.looked(DesiredState(), "")
    assert orders.suspended == {"a"}
    orders.looked(declared("a"), "")
    assert orders.suspended == {"a"}


def test_a_retry_is_taken_once_and_says_when_and_why() -> None:
    orders = orders_after(declared("a", "b"))
    said = orders.retry("a", failed("a"), None)
    assert "at once" in said
    assert "3 times" in said
    assert "LoadFailed" in said
    assert "no failed load" in orders.retry("b", None, None)
    assert orders.take_retries() == {"a"}
    assert orders.take_retries() == set()


def test_a_retry_of_what_failed_too_often_says_that_it_waits() -> None:
    orders = orders_after(declared("a"))
    assert "in 42 s" in orders.retry("a", failed("a", 10), 42.0)


def test_there_must_be_something_to_confirm() -> None:
    orders = orders_after(declared("a"))
    with pytest.raises(SplitlearnError) as refused:
        orders.confirm_prune(DIGEST)
    assert refused.value.reason == "NothingToConfirm"
    assert orders.confirmed_prune == ""


def test_a_confirmation_is_for_that_very_set_and_names_the_one_there_is() -> None:
    orders = orders_after(guarded("a", "b", digest="aaaaaaaaaaaa"))
    with pytest.raises(SplitlearnError, match=r"aaaaaaaaaaaa: a, b") as refused:
        orders.confirm_prune(DIGEST)
    assert refused.value.reason == "DigestMismatch"


def test_a_confirmation_names_what_goes_and_not_all_of_very_many() -> None:
    said = orders_after(guarded(*(f"m{n:02d}" for n in range(40)))).confirm_prune(DIGEST)
    assert said == "40 models are unloaded: m00, m01, m02, m03, m04 and 35 more"


def test_a_confirmation_is_used_once() -> None:
    """Or the same models, put back and deleted again, would go without being asked for."""
    orders = orders_after(guarded("a", "b"))
    orders.confirm_prune(DIGEST)
    orders.looked(declared("stays", next_check_s=0.1), DIGEST)
    assert orders.confirmed_prune == ""


def test_a_confirmation_waits_while_what_goes_is_not_certain() -> None:
    orders = orders_after(guarded("a", "b"))
    orders.confirm_prune(DIGEST)
    orders.looked(guarded("a", "b"), DIGEST)
    assert orders.confirmed_prune == DIGEST
    orders.looked(declared("a", "b", "stays", next_check_s=0.1), DIGEST)
    assert orders.confirmed_prune == DIGEST


def test_a_confirmation_ends_when_the_files_come_back() -> None:
    orders = orders_after(guarded("a", "b"))
    orders.confirm_prune(DIGEST)
    orders.looked(declared("a", "b", "stays"), DIGEST)
    assert orders.confirmed_prune == ""


def test_a_confirmation_that_was_restored_waits_for_the_first_decision() -> None:
    orders = Orders()
    orders.restore([], DIGEST)
    state = guarded("a", "b")
    orders.looked(DesiredState(undecided=state.models, next_check_s=0.1), DIGEST)
    assert orders.confirmed_prune == DIGEST
    orders.looked(declared("stays"), DIGEST)
    assert orders.confirmed_prune == ""


def test_a_confirmation_given_during_a_look_is_not_ended_by_it() -> None:
    orders = orders_after(guarded("a", "b"))
    orders.confirm_prune(DIGEST)
    orders.looked(guarded("a", "b"), "")
    assert orders.confirmed_prune == DIGEST
