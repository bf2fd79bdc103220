"""Factories in the user's own code: found, run afresh, and kept from harming the node."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel, LoadError, TerminalLoadError, WeightsNotFound
from splitlearn_manager.runtime.base import LoadedModel
from support.models import model_config

SCALE = """
import torch
class Scale(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(float(by)))
    def forward(self, x):
        return x * self.by
"""


def load(directory: Path, factory: str, **kwargs: object) -> LoadedModel:
    config = model_config(factory, config={"kwargs": kwargs}).with_base_dir(directory)
    return ModelLoader().load(config, "cpu")


def answer(directory: Path, factory: str, **kwargs: object) -> float:
    return load(directory, factory, **kwargs).module(torch.ones(1)).item()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_factory_beside_the_yaml_file_gets_its_kwargs(tmp_path: Path) -> None:
    write(tmp_path / "net.py", SCALE)
    loaded = load(tmp_path, "net:Scale", by=3)
    assert loaded.module(torch.ones(1)).item() == 3
    assert loaded.loader == "custom"
    assert loaded.weights_mb == 4 / 2**20


SPARSE = """
import torch
class Graph(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        links = torch.eye(3).to_sparse(layout=getattr(torch, layout))
        self.register_buffer("links", links)
    def forward(self, x):
        return self.links @ x
"""


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc"])
def test_a_module_with_sparse_buffers_is_loaded_and_measured(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "net.py", SPARSE)
    loaded = load(tmp_path, "net:Graph", layout=layout)
    assert torch.equal(loaded.module(torch.ones(3, 2)), torch.ones(3, 2))
    indices = 6 if layout == "sparse_coo" else 4 + 3
    # torch may take more for the indices than there are.
    assert 8 * indices + 4 * 3 <= loaded.weights_mb * 2**20 < 256


def test_device_is_passed_only_to_factories_that_name_it(tmp_path: Path) -> None:
    write(tmp_path / "net.py", f"{SCALE}\ndef on(device): return Scale(len(device))\n")
    assert answer(tmp_path, "net:on") == 3
    assert answer(tmp_path, "net:on", device="meta!") == 5
    assert answer(tmp_path, "net:Scale", by=2) == 2


def test_factory_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "work" / "net.py", SCALE)
    (tmp_path / "yaml").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert answer(tmp_path / "yaml", "net:Scale", by=4) == 4


def test_installed_factory_is_imported(tmp_path: Path) -> None:
    assert answer(tmp_path, "torch.nn:Identity") == 1
    assert load(tmp_path, "torch.nn:ReLU").module(torch.tensor(-1.0)) == 0


def test_a_changed_file_takes_effect_however_quick_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for factor in (2, 3, 4):
        write(tmp_path / "helper.py", f"FACTOR = {factor}\n")
        write(
            tmp_path / "net.py",
            f"from helper import FACTOR\n{SCALE}\ndef make(): return Scale(FACTOR)\n",
        )
        assert answer(tmp_path, "net:make") == factor
    assert sorted(p.name for p in tmp_path.iterdir()) == ["helper.py", "net.py"]


def test_two_directories_have_modules_of_the_same_name(tmp_path: Path) -> None:
    """Each sees its own helper, also in an import that runs later, while both are loaded."""
    late = f"{SCALE}\ndef make():\n    import helper\n    return Scale(helper.FACTOR)\n"
    late += (
        "def forward_import():\n    class Late(torch.nn.Module):\n        def forward(self, x):\n"
    )
    late += "            import helper\n            return x * helper.FACTOR\n    return Late()\n"
    models = []
    for factor in (2, 3):
        directory = tmp_path / str(factor)
        write(directory / "helper.py", f"FACTOR = {factor}\n")
        write(directory / "net.py", late)
        assert answer(directory, "net:make") == factor
        models.append(load(directory, "net:forward_import"))
    assert [m.module(torch.ones(1)).item() for m in models] == [2, 3]
    assert "helper" not in sys.modules
    assert "net" not in sys.modules


def test_packages_and_relative_imports_work(tmp_path: Path) -> None:
    write(tmp_path / "pkg" / "__init__.py", "")
    write(tmp_path / "pkg" / "deep" / "__init__.py", "from . import numbers_of_mine as n\n")
    write(tmp_path / "pkg" / "deep" / "numbers_of_mine.py", "FACTOR = 6\n")
    write(tmp_path / "shared.py", SCALE)
    net = "import pkg.deep.numbers_of_mine\nfrom ..pkg.deep import n\nfrom shared import Scale\n"
    net = net.replace("from ..pkg.deep", "from .deep")
    write(
        tmp_path / "pkg" / "net.py",
        f"{net}\ndef make(): return Scale(n.FACTOR + pkg.deep.n.FACTOR)\n",
    )
    assert answer(tmp_path, "pkg.net:make") == 12


def test_a_namespace_directory_works(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "net.py", SCALE)
    assert answer(tmp_path, "plain.net:Scale", by=7) == 7


def test_the_standard_library_is_never_hidden(tmp_path: Path) -> None:
    write(tmp_path / "json.py", "raise RuntimeError('the wrong json')\n")
    write(tmp_path / "net.py", f"import json\njson.dumps({{}})\n{SCALE}")
    assert answer(tmp_path, "net:Scale", by=1) == 1


def test_release_leaves_no_trace(tmp_path: Path) -> None:
    write(tmp_path / "net.py", SCALE)
    modules, finders = set(sys.modules), list(sys.meta_path)
    loaded = load(tmp_path, "net:Scale", by=1)
    assert set(sys.modules) != modules
    loaded.release()
    loaded.release()
    gc.collect()
    assert set(sys.modules) == modules
    assert sys.meta_path == finders


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('no such size\\nmore')", r"ValueError: no such size \(.*net\.py:3\)"),
        ("raise SystemExit(3)", r"SystemExit: 3 \(.*net\.py:3\)"),
        ("raise KeyboardInterrupt", r"KeyboardInterrupt \(.*net\.py:3\)"),
        ("import not_installed_anywhere", r"ModuleNotFoundError: .*not_installed.*net\.py:3\)"),
        ("import helper; helper.fail()", r"ZeroDivisionError: .*helper\.py:2\)"),
        ("import torch; torch.zeros(2) + torch.zeros(3)", r"RuntimeError: .*net\.py:3\)"),
    ],
)
def test_what_the_factory_raises_is_told_with_its_line(
    tmp_path: Path, body: str, words: str
) -> None:
    write(tmp_path / "helper.py", "def fail():\n    return 1 / 0\n")
    write(tmp_path / "net.py", f"\ndef make():\n    {body}\n")
    modules = set(sys.modules)
    with pytest.raises(LoadError, match=words) as caught:
        load(tmp_path, "net:make")
    assert caught.value.message.startswith("net:make raised ")
    assert not isinstance(caught.value, TerminalLoadError)
    assert set(sys.modules) == modules


def test_a_syntax_error_is_told_with_its_line(tmp_path: Path) -> None:
    write(tmp_path / "net.py", "x = 1\ndef make(:\n")
    with pytest.raises(LoadError, match=r"SyntaxError: .*net\.py:2\)"):
        load(tmp_path, "net:make")


def test_a_missing_factory_lists_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "net.py", SCALE)
    with pytest.raises(InvalidModel, match="has no 'Scalar'; it has Scale"):
        load(tmp_path, "net:Scalar")


def test_a_factory_that_cannot_be_called_like_that_says_why(tmp_path: Path) -> None:
    write(tmp_path / "net.py", SCALE)
    with pytest.raises(InvalidModel, match=r"net:Scale\(by\).*'width'"):
        load(tmp_path, "net:Scale", width=3)
    with pytest.raises(InvalidModel, match="by"):
        load(tmp_path, "net:Scale")


@pytest.mark.parametrize(("value", "words"), [("None", "None"), ("lambda x: x", "a function")])
def test_a_factory_must_return_a_module(tmp_path: Path, value: str, words: str) -> None:
    write(tmp_path / "net.py", f"def make(): return {value}\n")
    with pytest.raises(InvalidModel, match=f"net:make returned {words}"):
        load(tmp_path, "net:make")


def test_a_missing_module_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=str(tmp_path)):
        load(tmp_path, "no_such_module_here:make")


OUTPUTS = """
import torch
class Net(torch.nn.Module):
    def __init__(self, kind): super().__init__(); self.kind = kind
    def forward(self, x, extra=0.0):
        y = x + extra
        if self.kind == "dict": return {"loss": None, "logits": y, "hidden": y * 2}
        if self.kind == "tuple": return (y * 3, y)
        if self.kind == "nested": return ([1], "text")
        return y
class Cached(torch.nn.Module):
    def forward(self, x, past_key_values=None, use_cache=False):
        past = past_key_values[0][0] if past_key_values else torch.zeros(1, 1, 1, 1)
        y = {"logits": x + past.sum()}
        return (y, ((past + 1, past),)) if use_cache else y
"""


def test_output_chooses_among_what_the_module_returns(tmp_path: Path) -> None:
    write(tmp_path / "net.py", OUTPUTS)

    def out(kind: str, **keys: object) -> float:
        config = model_config("net:Net", config={"kwargs": {"kind": kind}, **keys})
        module = ModelLoader().load(config.with_base_dir(tmp_path), "cpu").module
        return module(torch.ones(1)).item()

    assert out("dict") == 1
    assert out("dict", output="hidden") == 2
    assert out("tuple") == 3
    assert out("tuple", output="1") == 1
    assert out("tensor", forward_kwargs={"extra": 4.0}) == 5
    with pytest.raises(InvalidModel, match="the outputs logits, hidden"):
        out("dict", output="loss")
    with pytest.raises(InvalidModel, match="single tensor"):
        out("tensor", output="logits")
    with pytest.raises(InvalidModel, match="mean_pooled"):
        out("tensor", output="mean_pooled")
    with pytest.raises(InvalidModel, match="no tensor"):
        out("nested")


def test_a_module_with_a_cache_keeps_it(tmp_path: Path) -> None:
    write(tmp_path / "net.py", OUTPUTS)
    module = load(tmp_path, "net:Cached").module
    assert module(torch.ones(1)) == 1
    output, presents = module(torch.ones(1), use_cache=True)
    assert output == 1
    output, presents = module(torch.ones(1), past_key_values=presents, use_cache=True)
    assert output == 2
    assert presents[0][0] == 2
