"""Models in threads of this process: they answer, and leave nothing behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_comm.core import InvalidRequest
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import LoadError, ModelUnavailable, WarmupFailed
from splitlearn_manager.runtime.base import LoadedModel
from splitlearn_manager.runtime.thread import RunningInThreads, ThreadRuntime
from support.models import model_config, save_mlp, tiny_bert, tiny_gpt2


class Remembering:
    """A loader that keeps weak references to what it loaded."""

    def __init__(self) -> None:
        self.modules: list[weakref.ref[nn.Module]] = []
        self.released = 0

    def load(self, config: object, device: str) -> LoadedModel:
        from splitlearn_manager.config.model_config import ModelConfig

        assert isinstance(config, ModelConfig)
        loaded = ModelLoader().load(config, device)
        self.modules.extend(weakref.ref(m) for m in loaded.module.modules())

        def release() -> None:
            self.released += 1
            loaded_release()

        loaded_release = loaded.release
        module, notes = loaded.module, loaded.notes
        return LoadedModel(module, loaded.weights_mb, loaded.loader, notes, release)

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.modules)


def start(path: object, **keys: object) -> RunningInThreads:
    return ThreadRuntime(ModelLoader()).start(model_config(path, **keys), "cpu")


def test_a_started_model_answers_and_is_measured(tmp_path: Path) -> None:
    original = save_mlp(tmp_path / "m.pt")
    running = start(tmp_path / "m.pt")
    x = torch.rand(3, 8)
    assert torch.equal(running.compute_function.compute(x), original(x))  # type: ignore[arg-type]
    assert running.memory_mb == sum(p.nbytes for p in original.parameters()) / 2**20
    activations = running.measure_activations()
    assert activations is not None
    assert activations.mb(32) == 32 * (8 + 2 * 16) * 4 / 2**20
    assert running.warmed
    assert running.notes == ()
    assert not running.joins
    joining = running.find_joining()
    running.join(joining)
    assert running.joins
    assert running.notes == ("requests of equal shape are joined into batches",)


class Counting:
    """A loader that notes how many threads PyTorch uses for it."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def load(self, config: object, device: str) -> LoadedModel:
        self.threads.append(torch.get_num_threads())
        return LoadedModel(nn.Linear(8, 8).eval(), 0.0, "counting")


def test_a_load_uses_all_processors_whatever_forwards_are_limited_to(tmp_path: Path) -> None:
    usual = torch.get_num_threads()
    loader = Counting()
    runtime = ThreadRuntime(loader)  # type: ignore[arg-type]
    config = model_config(tmp_path / "m.pt")

    def load() -> None:
        runtime.start(config, "cpu")

    for limit in (usual, usual + 1):
        forward = threading.Thread(target=torch.set_num_threads, args=(limit,))
        forward.start()
        forward.join()
        loading = threading.Thread(target=load)
        loading.start()
        loading.join()
    torch.set_num_threads(usual)
    assert loader.threads == [usual, usual]


def test_a_started_model_can_be_trained(tmp_path: Path) -> None:
    original = save_mlp(tmp_path / "m.pt")
    function = start(tmp_path / "m.pt").compute_function
    x = torch.rand(3, 8)
    output = function.forward_for_training(x, "f")
    grad = function.backward("f", torch.ones_like(output), learning_rate=0.1)
    leaf = x.clone().requires_grad_()
    original(leaf).sum().backward()
    assert torch.allclose(grad, leaf.grad)  # type: ignore[arg-type]
    after = function.compute(x)
    assert isinstance(after, torch.Tensor)
    assert not torch.equal(after, output)


def test_a_text_model_takes_ids_as_floats_and_checks_them(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    function = start(tmp_path, config={"output": "mean_pooled"}).compute_function
    answer = function.compute(torch.tensor([[5.0, 7.0, 0.0]]))
    assert isinstance(answer, torch.Tensor)
    assert answer.shape == (1, 16)
    with pytest.raises(InvalidRequest, match="60"):
        function.compute(torch.tensor([[60.0]]))


def test_a_decoder_offers_its_cache(tmp_path: Path) -> None:
    tiny_gpt2(tmp_path)
    function = start(tmp_path).compute_function
    assert function.get_info()["key_value_cache"] is True


def test_input_shape_with_free_dimensions_is_enforced(tmp_path: Path) -> None:
    save_mlp(tmp_path / "m.pt")
    function = start(tmp_path / "m.pt", config={"input_shape": [-1, 8]}).compute_function
    with pytest.raises(InvalidRequest, match=r"\[1, 1, 8\]"):
        function.compute(torch.rand(1, 1, 8))


def test_input_dtype_of_the_config_holds(tmp_path: Path) -> None:
    torch.save(nn.Identity(), tmp_path / "m.pt")
    running = start(tmp_path / "m.pt", config={"input_dtype": "int64"})
    answer = running.compute_function.compute(torch.tensor([3.0]))
    assert isinstance(answer, torch.Tensor)
    assert answer.dtype is torch.int64


@pytest.mark.parametrize("kind", ["whole", "huggingface", "factory"])
def test_loading_and_closing_again_and_again_leaves_nothing(tmp_path: Path, kind: str) -> None:
    path: object = tmp_path / "m.pt"
    if kind == "whole":
        save_mlp(tmp_path / "m.pt")
    elif kind == "huggingface":
        path = tmp_path / "bert"
        tiny_bert(tmp_path / "bert")
    else:
        (tmp_path / "net.py").write_text(
            "import torch\ncache = []\ndef make():\n    cache.append(torch.nn.Linear(4, 4))\n"
            "    return cache[0]\n"
        )
        path = "net:make"
    loader = Remembering()
    runtime = ThreadRuntime(loader)
    for count in range(1, 4):
        running = runtime.start(model_config(path).with_base_dir(tmp_path), "cpu")
        function = running.compute_function
        if kind != "huggingface":
            width = 4 if kind == "factory" else 8
            function.forward_for_training(torch.rand(1, width), "kept")
        assert loader.alive
        del function
        running.close()
        running.close()
        assert loader.alive == 0
        assert loader.released == count
    with pytest.raises(ModelUnavailable):
        _ = running.compute_function
    assert running.measure_activations() is None


def test_a_failed_warmup_leaves_nothing_although_the_error_is_kept(tmp_path: Path) -> None:
    save_mlp(tmp_path / "m.pt")
    loader = Remembering()
    config = model_config(tmp_path / "m.pt", config={"input_shape": [1, 3]})
    with pytest.raises(WarmupFailed) as caught:
        ThreadRuntime(loader).start(config, "cpu")
    assert loader.modules
    assert loader.alive == 0
    assert loader.released == 1
    assert "[1, 3]" in caught.value.message


def test_a_failed_load_leaves_nothing_although_the_error_is_kept(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = torch.nn.Parameter(torch.ones(3))\n"
        "        raise ValueError('after all')\n"
    )
    gc.collect()
    before = sum(type(o).__name__ == "Net" for o in gc.get_objects())
    with pytest.raises(LoadError, match="after all"):
        ThreadRuntime(ModelLoader()).start(model_config("net:Net").with_base_dir(tmp_path), "cpu")
    after = sum(type(o).__name__ == "Net" for o in gc.get_objects())
    assert after == before


def collections_of(work: Callable[[], None]) -> int:
    """How often a whole look for garbage was begun meanwhile."""
    begun: list[object] = []

    def told(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            begun.append(info)

    gc.callbacks.append(told)
    try:
        work()
    finally:
        gc.callbacks.remove(told)
    return len(begun)


def test_closing_stops_nobody_to_look_for_garbage(tmp_path: Path) -> None:
    save_mlp(tmp_path / "m.pt")
    running = start(tmp_path / "m.pt")
    assert collections_of(running.close) == 0


def test_a_model_that_refers_to_itself_is_freed_at_once(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n"
        "        super().__init__(4, 4)\n        self.__dict__['itself'] = self\n"
    )
    loader = Remembering()
    running = ThreadRuntime(loader).start(model_config("net:Net").with_base_dir(tmp_path), "cpu")
    gc.collect()
    assert loader.alive
    assert collections_of(running.close) == 1
    assert loader.alive == 0
