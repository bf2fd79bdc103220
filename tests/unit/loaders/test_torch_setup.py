"""The first models of a process may be loaded side by side, whatever torch sets up at its first use."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import torch
from torch import nn
from torch.fx import _symbolic_trace

from splitlearn_manager.core.loaders.torch_setup import TORCH_SETUP
from splitlearn_manager.runtime.optimize.compiler import COMPILER

NET = """
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.by
"""

# Whoever imports for a user's module lets the other threads run for long: the worst moment there is.
LOAD_TWO = """
import sys, threading
from pathlib import Path
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.loaders.source_tree import SourceTree
from splitlearn_manager.core.model_loader import ModelLoader

has, pause = SourceTree._has, threading.Event()

def slowly(tree, name):
    pause.wait(0.05)
    return has(tree, name)

SourceTree._has = slowly
config = ModelConfig(model_id="m", model_path="net:Scale").with_base_dir(Path(sys.argv[1]))
threads = [threading.Thread(target=ModelLoader().load, args=(config, "cpu")) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("loaded")
"""


def test_the_first_loads_of_a_process_run_side_by_side_without_a_deadlock(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_TWO, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr


class Serving(nn.Module):
    """Stays in its forward until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inside.set()
        assert self.go.wait(60)
        return x + 1


class Serves(nn.Module):
    """Has another module answer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.inner(x)
        return answer


class Meets(nn.Module):
    """While it is called, another module is called in another thread, for longer than it takes itself."""

    def __init__(self, other: threading.Thread, inside: threading.Event) -> None:
        super().__init__()
        # Under two names: then torch looks at all attributes that are modules.
        self.layer = self.again = nn.Linear(2, 2)
        self.meet = lambda: (other.start(), inside.wait(60)) if other.ident is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meet()
        answer: torch.Tensor = self.again(self.layer(x))
        return answer


def test_a_module_is_exported_while_others_are_called_in_other_threads() -> None:
    TORCH_SETUP.ensure()
    inner, answers = Serving(), list[torch.Tensor]()
    serving = Serves(inner)
    asked = torch.ones(1, 2)
    other = threading.Thread(target=lambda: answers.append(serving(asked)))
    module = Meets(other, inner.inside)
    try:
        with COMPILER.turn(None), torch.no_grad():
            exported = torch.export.export(module, (torch.ones(1, 2),), strict=False)
    finally:
        inner.go.set()
        other.join()
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.linear.default", "aten.linear.default"]
    assert [answer.tolist() for answer in answers] == [[[2.0, 2.0]]]


class Traced(nn.Module):
    """Tells that it is being traced, and may be kept there."""

    def __init__(self, may_go_on: threading.Event) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.inside, self.may_go_on = threading.Event(), may_go_on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layer(x)
        self.inside.set()
        assert self.may_go_on.wait(60)
        return answer


def test_two_traces_at_once_leave_modules_as_they_were() -> None:
    TORCH_SETUP.ensure()
    before = nn.Module.__call__, nn.Module.__getattr__
    modules = first, second = Traced(threading.Event()), Traced(threading.Event())
    traced: list[torch.fx.GraphModule] = []
    threads = [
        threading.Thread(
            target=lambda module=module: traced.append(torch.fx.symbolic_trace(module))
        )
        for module in modules
    ]
    try:
        threads[0].start()
        assert first.inside.wait(60)
        threads[1].start()
        # What a second trace may do beside the first one, it has begun by then.
        second.inside.wait(0.2)
    finally:
        for module, thread in zip(modules, threads, strict=True):
            module.may_go_on.set()
            thread.join(60)
        left = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = before  # type: ignore[method-assign]
        still_tracing = _symbolic_trace._is_fx_tracing_flag
        _symbolic_trace._is_fx_tracing_flag = False
    assert left == before
    assert not still_tracing, "nothing could be compiled any more"
    assert len(traced) == 2
