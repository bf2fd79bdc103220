"""A real node follows its directory: what changes a model does what it says, all else does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_comm import RemoteComputeError
from support.node import Node
from support.served import (
    WIDTH,
    Callers,
    Sentinel,
    X,
    answer_of,
    condition,
    constant,
    declare,
    history,
    impatient,
    loads,
    replace_file,
    save_version,
    version_bytes,
    version_of,
    write_factory,
)
from support.waiting import eventually

SETTINGS = {"max_models": 20, "settle_s": 0.1, "resync_s": 0.5, "max_workers": 20}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("served") / "desired"
    directory.mkdir()
    write_factory(directory)
    with Node(directory, SETTINGS) as node:
        yield node
        assert node.stop() == 0
        assert not node.find("Traceback")


@pytest.fixture(scope="module")
def sentinel(node: Node) -> Sentinel:
    return Sentinel(node)


def test_writing_a_file_serves_the_model_and_deleting_it_unloads_it(node: Node) -> None:
    path = declare(node.directory, "comes-and-goes", config=constant(3.0))
    status = node.wait_phase("comes-and-goes", "Ready")
    assert (status["sync"], status["health"]) == ("Synced", "Healthy")
    assert status["source"] == "comes-and-goes.yaml"
    assert answer_of(node, "comes-and-goes") == 3.0
    path.unlink()
    node.wait_gone("comes-and-goes")
    with impatient(node) as client, pytest.raises(RemoteComputeError, match="NOT_FOUND"):
        client.compute(X, model_id="comes-and-goes")
    assert "comes-and-goes" not in node.get("/metrics")[1]


def test_a_key_that_applies_in_place_changes_it_without_a_reload(node: Node) -> None:
    declare(node.directory, "adjusted", config=constant(1.0))
    node.wait_phase("adjusted", "Ready")
    declare(node.directory, "adjusted", config=constant(1.0), priority=7, endpoint="front-door")
    status = node.wait_generation("adjusted", 2)
    assert loads(node, "adjusted") == 1
    changes = "priority 0 → 7, endpoint none → front-door"
    assert ("Adjusted", changes) in history(status)
    assert answer_of(node, "front-door") == 1.0
    assert condition(status, "Ready")["status"] == "True"


def test_a_loading_key_reloads_while_a_client_calls(node: Node) -> None:
    declare(node.directory, "edited", config=constant(1.0))
    node.wait_phase("edited", "Ready")
    with Callers(node, "edited") as callers:
        declare(node.directory, "edited", config=constant(2.0))
        node.wait_generation("edited", 2)
        callers.one_more_each()
    seen = [float(answer[0, 0]) for answer in callers.answers[0]]
    assert set(seen) == {1.0, 2.0}
    assert seen == sorted(seen)
    assert loads(node, "edited") == 2


def test_editing_a_factorys_python_file_reloads(tmp_path: Path, node: Node) -> None:
    directory = node.directory / "coded"
    directory.mkdir()
    write_factory(directory, name="own_nets")
    declare(directory, "coded", model_path="own_nets:constant", config=constant(1.0))
    node.wait_phase("coded", "Ready")
    assert answer_of(node, "coded") == 1.0
    write_factory(directory, step=10.0, name="own_nets")
    eventually(lambda: answer_of(node, "coded") == 11.0, "the edited factory answers")
    assert loads(node, "coded") == 2


def test_weights_replaced_by_a_rename_are_served(node: Node) -> None:
    weights = node.directory / "renamed.pt"
    save_version(weights, 1)
    declare(node.directory, "renamed", model_path="renamed.pt")
    node.wait_phase("renamed", "Ready")
    with Callers(node, "renamed") as callers:
        save_version(weights, 2)
        callers.wait_for(lambda: version_of(callers.answers[0][-1]) == 2, "the new weights answer")
    assert {version_of(answer) for answer in callers.answers[0]} == {1, 2}
    assert loads(node, "renamed") == 2


def test_weights_written_slowly_in_place_never_answer_as_anything_but_old_or_new(
    node: Node, sentinel: Sentinel
) -> None:
    weights = node.directory / "slow.pt"
    save_version(weights, 1)
    declare(node.directory, "slow", model_path="slow.pt")
    node.wait_phase("slow", "Ready")
    data = version_bytes(weights, 2)
    half = len(data) // 2
    with Callers(node, "slow") as callers:
        with weights.open("r+b") as file:
            file.truncate(0)
            for begin in range(0, half, 64):
                file.write(data[begin : min(begin + 64, half)])
                file.flush()
            # Long enough for the half to settle and to be found broken.
            eventually(lambda: loads(node, "slow", "failure"), "the half was tried")
            sentinel.passes()
            file.write(data[half:])
        callers.wait_for(lambda: version_of(callers.answers[0][-1]) == 2, "the new weights answer")
    assert {version_of(answer) for answer in callers.answers[0]} == {1, 2}
    status = node.wait_phase("slow", "Ready")
    assert (status["sync"], status["health"]) == ("Synced", "Healthy")


def test_a_state_dict_and_the_factory_that_builds_its_module_serve(node: Node) -> None:
    replace_file(
        node.directory / "linear.py",
        "from torch import nn\n\n\ndef build(width):\n    return nn.Linear(width, width)\n",
    )
    module = nn.Linear(WIDTH, WIDTH)
    torch.save(module.state_dict(), node.directory / "linear.pt")
    options = {"factory": "linear:build", "kwargs": {"width": WIDTH}}
    declare(node.directory, "linear", model_path="linear.pt", config=options)
    node.wait_phase("linear", "Ready")
    with impatient(node) as client, torch.no_grad():
        assert torch.allclose(client.compute(X, model_id="linear"), module(X), atol=1e-6)


def test_what_changes_no_meaning_changes_nothing(node: Node, sentinel: Sentinel) -> None:
    """Touching, reordering, commenting, renaming, moving with an absolute path: not one event."""
    weights = node.directory / "still.pt"
    save_version(weights, 1)
    keys = {"model_id": "still", "model_path": str(weights), "device": "cpu", "priority": 3}
    path = node.directory / "still.yaml"

    def write(target: Path, order: list[str], comment: str = "") -> None:
        replace_file(target, comment + "".join(f"{key}: {keys[key]}\n" for key in order))

    write(path, list(keys))
    node.wait_phase("still", "Ready")
    sentinel.passes()
    before = node.status("still")

    def assert_untouched(what: str) -> None:
        sentinel.passes()
        after = node.status("still")
        assert history(after) == history(before), what
        for key in ("phase", "generation", "observed_generation", "requests"):
            assert after[key] == before[key], what
        assert loads(node, "still") == 1, what

    os.utime(path)
    assert_untouched("its time stamp")
    write(path, list(reversed(keys)))
    assert_untouched("the order of its keys")
    write(path, list(reversed(keys)), comment="# Served for the search page.\n\n")
    assert_untouched("a comment")
    path.rename(node.directory / "quiet.yml")
    assert_untouched("its name")
    (node.directory / "below").mkdir()
    (node.directory / "quiet.yml").rename(node.directory / "below" / "quiet.yml")
    assert_untouched("its directory")
    assert node.status("still")["source"] == "below/quiet.yml"
    os.utime(weights)
    with impatient(node) as client:
        assert version_of(client.compute(X, model_id="still")) == 1


def test_a_mounted_config_map_is_followed_when_its_data_is_swapped(node: Node) -> None:
    """The files are links through `..data`, whose swap names no YAML file at all."""
    mount = node.directory / "config-map"
    for version in (1, 2):
        data = mount / f"..version_{version}"
        data.mkdir(parents=True)
        write_factory(data, name="mounted")
        keys = {"model_path": "mounted:constant", "config": constant(float(version))}
        declare(data, "mounted", **keys)
    (mount / "..data").symlink_to("..version_1")
    for name in ("mounted.yaml", "mounted.py"):
        (mount / name).symlink_to(f"..data/{name}")
    node.wait_phase("mounted", "Ready")
    with Callers(node, "mounted") as callers:
        (mount / "..data_new").symlink_to("..version_2")
        os.replace(mount / "..data_new", mount / "..data")
        node.wait_generation("mounted", 2)
        callers.one_more_each()
    assert {float(answer[0, 0]) for answer in callers.answers[0]} == {1.0, 2.0}


def test_a_linked_directory_that_is_turned_to_another_checkout_is_followed(tmp_path: Path) -> None:
    """As git-sync does it: the root itself is a link. Also: settings of server.yaml apply live."""
    for name, value in (("one", 1.0), ("two", 2.0)):
        checkout = tmp_path / name
        checkout.mkdir()
        write_factory(checkout)
        declare(checkout, "first", config=constant(value))
        declare(checkout, "second", config=constant(value))
    link = tmp_path / "link"
    link.symlink_to("one")
    with Node(link, {"max_models": 1, "settle_s": 0.1, "resync_s": 0.5}) as node:
        node.wait_phase("first", "Ready")
        waiting = node.wait_phase("second", "Pending")
        assert waiting["reason"] == "MaxModels"
        assert "max_models is 1" in str(waiting["message"])

        def set_server(**keys: object) -> None:
            values = {"port": 0, "metrics_port": 0, "settle_s": 0.1, "resync_s": 0.5, **keys}
            text = "".join(f"{key}: {value}\n" for key, value in values.items())
            replace_file(link.resolve() / "server.yaml", text)

        set_server(max_models=4)
        node.wait_phase("second", "Ready")
        assert node.find("event=SettingChanged key=max_models value=4")

        # Keys that wait for the next start are named once, and touch nothing.
        waiting_keys = {"max_workers": 3, "host": "localhost"}
        set_server(max_models=4, **waiting_keys)
        eventually(lambda: node.find("event=RestartRequired"), "the restart keys are named")
        assert "keys=host,max_workers" in node.find("event=RestartRequired")[0]
        sentinel = Sentinel(node)
        sentinel.passes()
        assert answer_of(node, "first") == 1.0

        set_server(max_models=4, log_level="WARNING", **waiting_keys)
        eventually(lambda: node.find("key=log_level value=WARNING"), "the log level is taken")
        sentinel.passes()
        adjusted = len(node.find("event=Adjusted"))
        sentinel.passes()
        assert len(node.find("event=Adjusted")) == adjusted
        set_server(max_models=4, log_level="INFO", **waiting_keys)
        sentinel.passes()
        eventually(lambda: len(node.find("event=Adjusted")) > adjusted, "the log level is back")
        assert len(node.find("event=RestartRequired")) == 1

        # Without the file the defaults hold, as they will for the next start.
        text = (link / "server.yaml").read_text()
        (link / "server.yaml").unlink()
        eventually(lambda: node.find("key=max_models value=5"), "the default is taken")
        replace_file(link.resolve() / "server.yaml", text)
        eventually(lambda: len(node.find("key=max_models value=4")) == 2, "the file is back")

        replace_file(tmp_path / "two" / "server.yaml", (link / "server.yaml").read_text())
        with Callers(node, "first") as callers:
            (tmp_path / "new").symlink_to("two")
            os.replace(tmp_path / "new", link)
            callers.wait_for(
                lambda: float(callers.answers[0][-1][0, 0]) == 2.0, "the other checkout answers"
            )
        assert {float(answer[0, 0]) for answer in callers.answers[0]} == {1.0, 2.0}
        node.wait_gone("sentinel")
        assert node.stop() == 0
