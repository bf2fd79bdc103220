"""docs/python-api.md holds: every block of it runs as written.

Only file names, ports and `cuda` are substituted, by `as_here`. A block sees what the blocks before it
would have left (`server`, the imports), given to it as its variables.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
import socket
import threading
import typing
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import splitlearn_manager
from splitlearn_comm import GRPCComputeClient
from splitlearn_manager import ManagedServer, ModelConfig, ServerConfig, errors
from splitlearn_manager.config.loader_options import LoaderOptions
from support.waiting import eventually

DOCUMENT = Path(__file__).parents[2] / "docs" / "python-api.md"
SOURCE = Path(splitlearn_manager.__file__).parent

_BLOCK = re.compile(r"^```(python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

EXAMPLES = {
    "The Python API",
    "Basic Server",
    "Client Connection",
    "Many Requests at a Time",
    "Smaller Messages",
    "Clients on the Same Machine",
    "Client for asyncio",
    "Configuration from YAML",
    "Multi-Model Server",
    "Dynamic Model Management",
    "Resource Management",
    "Monitoring",
    "A server for a while",
    "Model Configuration",
    "Server Configuration",
    "Errors",
}
CLASSES = {"ManagedServer", "ModelManager", "ResourceManager"}

Variables = dict[str, object]


def blocks() -> dict[str, str]:
    """The code of the document, by the heading above it."""
    text = DOCUMENT.read_text()
    outside = _BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text)
    headings = [(outside[: h.start()].count("\n"), h[1]) for h in _HEADING.finditer(outside)]
    found: dict[str, str] = {}
    for block in _BLOCK.finditer(text):
        line = text[: block.start()].count("\n")
        heading = [title for start, title in headings if start < line][-1]
        assert heading not in found, (
            f"two blocks under {heading!r}: the tests name blocks by heading"
        )
        found[heading] = block[2]
    return found


def as_here(code: str, **others: str) -> str:
    """The code with ports that the system chooses and the CPU in place of a GPU."""
    changes = {
        "ManagedServer()": "ManagedServer(ServerConfig(port=0, metrics_port=0))",
        "port=50051": "port=0",
        "metrics_port=8000": "metrics_port=0",
        "port: 50051": "port: 0",
        "metrics_port: 8000": "metrics_port: 0",
        '"cuda:0"': '"cpu"',
        '"cuda"': '"cpu"',
        **others,
    }
    for written, here in changes.items():
        code = code.replace(written, here)
    return code


def run(heading: str, variables: Variables, **others: str) -> Variables:
    """Runs the block under a heading; gives its variables."""
    code = compile(as_here(blocks()[heading], **others), f"{DOCUMENT}: {heading}", "exec")
    exec(code, variables)
    return variables


def saved(path: Path, width: int = 4, factor: float = 1.0) -> Path:
    """A model that multiplies by `factor`."""
    model = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(width) * factor)
    torch.save(model, path)
    return path


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[ManagedServer]:
    with ManagedServer(ServerConfig(port=0, metrics_port=0)) as server:
        yield server


class Stopping:
    """Stops the servers that blocks leave running when the test ends."""

    def __init__(self) -> None:
        self.variables: Variables = {
            "ManagedServer": ManagedServer,
            "ServerConfig": ServerConfig,
            "ModelConfig": ModelConfig,
        }

    def server(self) -> ManagedServer:
        server = self.variables["server"]
        assert isinstance(server, ManagedServer)
        return server


@pytest.fixture
def left() -> Iterator[Stopping]:
    stopping = Stopping()
    yield stopping
    if "server" in stopping.variables:
        stopping.server().stop(grace=0)


def test_every_block_of_the_document_has_a_test() -> None:
    assert set(blocks()) == EXAMPLES | CLASSES


def test_every_promised_name_imports_from_the_top_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = run("The Python API", {})
    assert capsys.readouterr().out == "imports ok\n"
    promised = {name for name in names if not name.startswith("_")}
    assert promised == set(splitlearn_manager.__all__) - {"__version__"}
    assert all(inspect.isclass(names[name]) for name in promised)


def test_the_basic_server_serves_the_client_until_it_is_stopped(
    left: Stopping, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[BaseException] = []
    left.variables["torch"] = torch

    def serve() -> None:
        try:
            run("Basic Server", left.variables)
        except BaseException as error:
            raised.append(error)

    serving = threading.Thread(target=serve)
    serving.start()
    eventually(lambda: raised or ("server" in left.variables and left.server().port), "it listens")
    assert not raised
    port = left.server().port

    client = run("Client Connection", {}, **{"localhost:50051": f"localhost:{port}"})
    model = left.variables["model"]
    sent, answered = client["input_tensor"], client["output_tensor"]
    assert isinstance(model, nn.Module)
    assert isinstance(answered, torch.Tensor)
    torch.testing.assert_close(answered, model(sent))
    assert re.fullmatch(r"Avg latency: \d+\.\d\dms\n", capsys.readouterr().out)

    # Nothing but the server is needed for the other ways to ask it.
    run("Many Requests at a Time", {}, **{"localhost:50051": f"localhost:{port}"})
    assert capsys.readouterr().out == "torch.Size([1, 10, 768])\n" * 101
    run("Smaller Messages", {}, **{"localhost:50051": f"localhost:{port}"})
    assert capsys.readouterr().out == "torch.float16\n"
    run("Client for asyncio", {}, **{"localhost:50051": f"localhost:{port}"})
    assert capsys.readouterr().out == "8\n"

    assert serving.is_alive()
    left.server().stop()
    serving.join(30)
    assert not serving.is_alive()
    assert not raised
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_configured_from_the_documents_yaml_serves_the_documents_model(
    tmp_path: Path, left: Stopping, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved(tmp_path / "model.pt", 768)
    path = {"/path/to/model.pt": str(model)}
    for name, heading in (("model", "Model Configuration"), ("server", "Server Configuration")):
        (tmp_path / f"{name}_config.yaml").write_text(as_here(blocks()[heading], **path))
    run("Configuration from YAML", left.variables)
    server = left.server()
    assert server.config == ServerConfig(host="0.0.0.0", port=0, metrics_port=0)
    caplog.set_level(logging.INFO, "splitlearn_manager")
    server.start()
    assert "event=OpenToOthers" in caplog.text
    with GRPCComputeClient(f"127.0.0.1:{server.port}") as client:
        x = torch.randn(1, 10, 768)
        torch.testing.assert_close(client.compute(x, model_id="my_model"), x)


def test_the_documents_model_file_says_what_it_says_in_python(tmp_path: Path) -> None:
    file = tmp_path / "model_config.yaml"
    file.write_text(blocks()["Model Configuration"])
    assert ModelConfig.from_yaml(file) == ModelConfig(
        model_id="my_model",
        model_path="/path/to/model.pt",
        model_type="pytorch",
        device="cuda:0",
        batch_size=32,
        max_memory_mb=4096,
        warmup=True,
        config=LoaderOptions(input_shape=(1, 10, 768), max_sequence_length=512),
    )


def test_the_documents_server_file_says_the_defaults_but_for_the_host(tmp_path: Path) -> None:
    file = tmp_path / "server_config.yaml"
    file.write_text(blocks()["Server Configuration"])
    assert ServerConfig.from_yaml(file) == ServerConfig(host="0.0.0.0")
    assert ServerConfig().host == "127.0.0.1"


def test_the_multi_model_server_answers_for_each_model(tmp_path: Path, left: Stopping) -> None:
    ids = ["model_a", "model_b", "model_c"]
    for number, model_id in enumerate(ids, start=1):
        saved(tmp_path / f"{model_id}.pt", factor=number)
    run("Multi-Model Server", left.variables)
    with GRPCComputeClient(f"127.0.0.1:{left.server().port}") as client:
        answers = [client.compute(torch.ones(1, 4), model_id=m)[0, 0].item() for m in ids]
        # Without an id the router takes them in turn.
        chosen = {client.compute(torch.ones(1, 4))[0, 0].item() for _ in ids}
    assert answers == [1.0, 2.0, 3.0]
    assert chosen == {1.0, 2.0, 3.0}


def test_models_are_loaded_reloaded_and_unloaded_while_the_server_runs(
    tmp_path: Path, server: ManagedServer
) -> None:
    for name in ("old_model_id", "model_id", "new"):
        path = saved(tmp_path / f"{name}.pt")
        if name != "new":
            server.load_model(ModelConfig(model_id=name, model_path=str(path), device="cpu"))
    saved(tmp_path / "model_id.pt", factor=5.0)
    new = ModelConfig(model_id="new", model_path=str(tmp_path / "new.pt"), device="cpu")
    variables = run("Dynamic Model Management", {"server": server, "new_config": new})

    info = variables["info"]
    assert isinstance(info, dict)
    assert (info["model_id"], info["state"]) == ("model_id", "READY")
    document = DOCUMENT.read_text()
    assert not [key for key in info if f"`{key}`" not in document]
    models = server.model_manager.list_models()
    assert sorted(str(m["model_id"]) for m in models) == ["model_id", "new"]
    assert all(set(m) == set(info) for m in models)
    assert server.model_manager.get_model("old_model_id") is None
    with GRPCComputeClient(f"127.0.0.1:{server.port}") as client:
        assert client.compute(torch.ones(1, 4), model_id="model_id")[0, 0].item() == 5.0


def test_resources_are_measured_and_a_device_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    variables = run("Resource Management", {})
    out = capsys.readouterr().out
    found = re.fullmatch(r"CPU: ([\d.]+)%\nMemory: ([\d.]+)MB\n", str(out))
    assert found
    assert 0 <= float(found[1]) <= 100
    assert float(found[2]) > 0
    assert re.fullmatch(r"cpu|cuda:\d+", str(variables["device"]))


def test_health_and_status_are_told(left: Stopping, capsys: pytest.CaptureFixture[str]) -> None:
    variables = run("Monitoring", left.variables)
    health = variables["health"]
    assert isinstance(health, dict)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"Status: {health['status']}", "Models loaded: 0"]
    # The document: "exposed from `start` on".
    left.server().start()
    with urllib.request.urlopen(
        f"http://127.0.0.1:{left.server().metrics_port}/metrics", timeout=10
    ) as answer:
        assert "models_loaded 0.0" in answer.read().decode()


def test_a_server_for_a_while_stops_at_the_end_of_its_block(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = run("A server for a while", {})["server"]
    assert isinstance(server, ManagedServer)
    assert capsys.readouterr().out == f"serving on port {server.port}\n"
    assert server.wait_for_termination(timeout=0)


def test_failures_are_exceptions_with_a_reason(
    server: ManagedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run("Errors", {"server": server, "ModelConfig": ModelConfig})
    load, unload = capsys.readouterr().out.splitlines()
    assert load.startswith("WeightsNotFound: ")
    assert "nowhere.pt" in load
    assert unload == "ModelNotFound: no model 'absent' is loaded"


def test_a_client_on_the_same_machine_sends_large_tensors_through_shared_memory(
    tmp_path: Path,
) -> None:
    path = tmp_path / "node.sock"
    config = ServerConfig(port=0, metrics_port=0, unix_socket=str(path))
    with ManagedServer(config) as server:
        server.load_model(ModelConfig(model_id="m", model_path=str(saved(tmp_path / "m.pt"))))
        written = "/path/to/desired/node.sock"
        client = run("Clients on the Same Machine", {}, **{written: str(path)})["client"]
        assert isinstance(client, GRPCComputeClient)
        x = torch.randn(1 << 15, 4)
        assert torch.equal(client.compute(x, "m"), x)
        client.close()


def test_every_error_and_every_reason_is_in_the_document() -> None:
    document = DOCUMENT.read_text()
    types = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.SplitlearnError)
    }
    reasons = {
        keyword.value.value
        for path in (*(SOURCE / "core").rglob("*.py"), *(SOURCE / "config").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant)
    }
    assert {"AlreadyLoaded", "OwnedByDirectory"} <= reasons
    assert not [word for word in types | reasons if f"`{word}`" not in document]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_have_the_documented_signatures(name: str) -> None:
    block = blocks()[name]
    tree = ast.parse(re.sub(r"^(    def .*)$", r"\1: ...", block, flags=re.MULTILINE))
    promised = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    assert promised.name == name
    real = getattr(splitlearn_manager, name)
    methods = [node for node in promised.body if isinstance(node, ast.FunctionDef)]
    assert len(methods) == block.count("def ")
    for method in methods:
        check_signature(method, getattr(real, method.name))


def check_signature(promised: ast.FunctionDef, real: object) -> None:
    """Every call that the promise allows is one that the real function takes, with the same types."""
    assert inspect.isfunction(real)
    where = real.__qualname__
    # The real one's annotations are text; those of arguments that nobody promised may not resolve here.
    known = {**vars(splitlearn_manager.errors), **_public(), **vars(typing)}
    parameters = list(inspect.signature(real).parameters.values())
    count = len(promised.args.args)
    first_default = count - len(promised.args.defaults)
    for index, (argument, parameter) in enumerate(
        zip(promised.args.args, parameters, strict=False)
    ):
        assert argument.arg == parameter.name, where
        if index >= first_default:
            default = ast.literal_eval(promised.args.defaults[index - first_default])
            assert parameter.default == default, f"{where}: default of {parameter.name}"
        if argument.annotation is not None:
            assert_same_type(argument.annotation, str(parameter.annotation), known, where)
    assert len(parameters) >= count, where
    for parameter in parameters[count:]:
        assert parameter.default is not inspect.Parameter.empty, f"{where}: {parameter.name}"
    if promised.returns is not None:
        returned = str(inspect.signature(real).return_annotation)
        assert_same_type(promised.returns, returned, known, where)


def _public() -> dict[str, object]:
    return {name: getattr(splitlearn_manager, name) for name in splitlearn_manager.__all__}


def assert_same_type(promised: ast.expr, real: str, known: Variables, where: str) -> None:
    want = eval(ast.unparse(promised), {}, known)
    have = eval(real, {}, known)
    assert _fits(have, want), f"{where}: {real} is not {ast.unparse(promised)}"


def _fits(have: object, want: object) -> bool:
    """Whether a type is the promised one, or says more than it (`dict[str, object]` for `Dict`)."""
    have_origin = typing.get_origin(have) or have
    want_origin = typing.get_origin(want) or want
    want_args = typing.get_args(want)
    if have == want:
        return True
    if have_origin != want_origin:
        return False
    return all(_fits(h, w) for h, w in zip(typing.get_args(have), want_args, strict=False))
