"""A real GPU's memory: what is measured, promised, refused and given back, as its driver sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.errors import AdmissionError, InsufficientMemory, LoadError
from support.real_gpu import LAYER_MB, WIDTH, Managers, RealGpu, Weights
from support.waiting import eventually

# Allocators round up, and kernels are loaded when they are first used: so much is nobody's model.
SLACK_MB = 48.0

X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))

GREEDY = """
import torch

def greedy(device):
    held = torch.ones(512 * 2**18, device=device)
    return torch.nn.Linear(2**20, 2**22, bias=False, device=device)
"""


def config(path: Path | str, model_id: str = "m", **keys: object) -> ModelConfig:
    """A model that is not warmed up, so that nothing but its weights is taken."""
    values = {"model_id": model_id, "model_path": str(path), "warmup": False, **keys}
    return ModelConfig.model_validate(values)


def answer(manager: ModelManager, model_id: str, x: torch.Tensor = X) -> torch.Tensor:
    with manager.lease(model_id) as lease:
        assert lease.instance.running is not None
        computed = lease.instance.running.compute_function.compute(x)
        assert isinstance(computed, torch.Tensor)
        return computed.cpu()


def device_of(manager: ModelManager, model_id: str) -> object:
    return manager.get_model_info(model_id)["device"]


def test_driver_and_torch_mean_the_same_gpu_by_the_same_number(
    gpu: RealGpu, manager_with: Managers
) -> None:
    resources = manager_with().resources
    shown = resources.get_current_usage().gpu
    assert len(shown) == torch.cuda.device_count()
    assert (shown[0].device, shown[0].uuid) == (gpu.device, gpu.uuid)
    assert resources.budgets_mb()[gpu.device] == pytest.approx(0.8 * gpu.total_mb)


def test_a_model_takes_what_was_measured_and_gives_all_of_it_back(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with()
    used_mb, torch_mb = gpu.used_mb, gpu.torch_mb
    gpu.forget_peak()
    manager.load_model(config(weights(512)))
    info = manager.get_model_info("m")
    assert info["device"] == gpu.device, "a GPU is preferred to the CPU"
    assert info["memory_mb"] == info["reserved_mb"] == pytest.approx(512, abs=0.1)
    assert gpu.torch_mb - torch_mb == pytest.approx(512, abs=1)
    assert gpu.used_mb - used_mb == pytest.approx(512, abs=SLACK_MB)
    assert gpu.torch_peak_mb - torch_mb <= 512 * 1.1, "a load costs what the weights cost"
    manager.unload_model("m")
    assert gpu.torch_mb == pytest.approx(torch_mb, abs=0.1)
    assert gpu.used_mb == pytest.approx(used_mb, abs=SLACK_MB)
    assert manager.snapshot().ledger.reservations == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_converted_model_is_measured_as_it_is_on_the_gpu(
    gpu: RealGpu, manager_with: Managers, weights: Weights, dtype: str
) -> None:
    manager = manager_with()
    before_mb = gpu.torch_mb
    manager.load_model(config(weights(128), config={"dtype": dtype}))
    assert manager.get_model_info("m")["memory_mb"] == pytest.approx(64, abs=0.1)
    assert gpu.torch_mb - before_mb == pytest.approx(64, abs=1)


def test_loads_and_unloads_of_many_sizes_leave_nothing_behind(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with()
    manager.load_model(config(weights(LAYER_MB), device=gpu.device))
    answer(manager, "m")
    manager.unload_model("m")
    used_mb, torch_mb = gpu.used_mb, gpu.torch_mb
    for layers in (1, 8, 2, 32, 4, 16, 1, 24, 3, 12):
        manager.load_model(config(weights(layers * LAYER_MB), device=gpu.device))
        answer(manager, "m")
        manager.unload_model("m")
        assert gpu.torch_mb == pytest.approx(torch_mb, abs=0.1)
        assert gpu.used_mb == pytest.approx(used_mb, abs=SLACK_MB)


def test_a_reservation_covers_a_forward_of_the_largest_batch(
    gpu: RealGpu, manager_with: Managers, tmp_path: Path
) -> None:
    wide = nn.Sequential(nn.Linear(512, 65536), nn.ReLU(), nn.Linear(65536, 512))
    torch.save(wide, tmp_path / "wide.pt")
    manager = manager_with()
    keys = {"batch_size": 256, "warmup": True, "config": {"input_shape": [-1, 512]}}
    manager.load_model(config(tmp_path / "wide.pt", **keys))
    info = manager.get_model_info("m")
    assert info["device"] == gpu.device
    reserved_mb = info["reserved_mb"]
    assert isinstance(reserved_mb, float)
    beside_mb = reserved_mb - sum(p.nbytes for p in wide.parameters()) / 2**20
    x = torch.randn(256, 512)
    answer(manager, "m", x)  # this thread's own first forward takes room for all later ones
    torch_mb = gpu.torch_mb
    gpu.forget_peak()
    answer(manager, "m", x)
    taken_mb = gpu.torch_peak_mb - torch_mb
    assert 120 <= taken_mb <= beside_mb * 1.02 + 1
    assert beside_mb <= taken_mb * 1.25 + SLACK_MB


def test_a_quota_holds_and_the_least_recently_used_makes_room(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with({gpu.device: 600})
    used_mb = gpu.used_mb
    first = [config(weights(256), model_id, device=gpu.device) for model_id in ("a", "b")]
    for model in first:
        manager.load_model(model)
    expected = answer(manager, "a")  # b is the one that was used less recently now
    manager.load_model(config(weights(256), "c", device=gpu.device))
    assert {str(m["model_id"]) for m in manager.list_models()} == {"a", "c"}
    assert torch.equal(answer(manager, "a"), expected)
    assert torch.equal(answer(manager, "c"), expected)
    assert gpu.used_mb - used_mb <= 600 + SLACK_MB
    manager.unload_model("c")
    manager.load_model(first[1])
    assert torch.equal(answer(manager, "b"), expected)


def test_a_model_larger_than_the_quota_is_refused_before_it_is_read_or_goes_to_the_cpu(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with({gpu.device: 100})
    torch_mb = gpu.torch_mb
    gpu.forget_peak()
    with pytest.raises(InsufficientMemory, match=rf"128 MB on {gpu.device}, .* 100 MB"):
        manager.load_model(config(weights(128), device=gpu.device))
    manager.load_model(config(weights(128)))
    assert device_of(manager, "m") == "cpu"
    assert gpu.torch_peak_mb == torch_mb


def test_a_new_version_is_loaded_beside_the_old_one_which_then_gives_its_memory_back(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with({gpu.device: 600})
    torch_mb = gpu.torch_mb
    manager.load_model(config(weights(256), device=gpu.device))
    expected = answer(manager, "m")
    gpu.forget_peak()
    before_mb = gpu.torch_mb
    manager.reload_model("m")
    eventually(lambda: len(manager.snapshot().instances) == 1, "the old version is gone")
    assert torch.equal(answer(manager, "m"), expected)
    assert gpu.torch_peak_mb - torch_mb >= 512
    assert gpu.torch_mb == pytest.approx(before_mb, abs=0.1)


def test_a_load_that_runs_out_of_memory_says_so_gives_it_back_and_disturbs_nobody(
    gpu: RealGpu, manager_with: Managers, weights: Weights, tmp_path: Path
) -> None:
    (tmp_path / "greedy_on_gpu.py").write_text(GREEDY)
    manager = manager_with()
    manager.load_model(config(weights(64), "serves", device=gpu.device))
    expected = answer(manager, "serves")
    used_mb, torch_mb = gpu.used_mb, gpu.torch_mb
    greedy = config("greedy_on_gpu:greedy", "greedy", device=gpu.device).with_base_dir(tmp_path)
    for _ in range(2):
        with pytest.raises(LoadError) as raised:
            manager.load_model(greedy)
        assert raised.value.reason == "OutOfMemory"
        assert gpu.torch_mb == pytest.approx(torch_mb, abs=0.1)
        assert gpu.used_mb == pytest.approx(used_mb, abs=SLACK_MB)
    assert torch.equal(answer(manager, "serves"), expected)
    manager.load_model(config(weights(256), "another", device=gpu.device))
    assert device_of(manager, "another") == gpu.device


def test_nothing_is_loaded_into_memory_that_others_have_taken_until_they_give_it_back(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with()
    filled = gpu.fill(leaving_mb=400)
    manager.look_at_memory()
    with pytest.raises(AdmissionError):
        manager.load_model(config(weights(256), device=gpu.device))
    assert manager.snapshot().instances == ()
    manager.load_model(config(weights(256), "elsewhere"))
    assert device_of(manager, "elsewhere") == "cpu"
    del filled
    gpu.tidy()

    def loads() -> bool:
        manager.tick()
        try:
            return manager.load_model(config(weights(256), device=gpu.device))
        except AdmissionError:
            return False

    eventually(loads, "there is room again", 30)
    assert device_of(manager, "m") == gpu.device


def test_the_gpu_answers_as_the_cpu_does(
    gpu: RealGpu, manager_with: Managers, weights: Weights
) -> None:
    manager = manager_with()
    for model_id, device in (("on_gpu", gpu.device), ("on_cpu", "cpu")):
        manager.load_model(config(weights(8 * LAYER_MB), model_id, device=device, warmup=True))
    torch.testing.assert_close(
        answer(manager, "on_gpu"), answer(manager, "on_cpu"), rtol=1e-3, atol=1e-4
    )
