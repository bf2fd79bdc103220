"""TorchScript archives: those of other people load as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_manager.core.loaders.torchscript import suspicious_code
from splitlearn_manager.core.model_loader import ModelLoader
from support.models import model_config

SILERO = "package:silero_vad/data/silero_vad.jit"


class Layers(nn.Module):
    """Its children are reached by getattr, as TorchScript writes names that are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_installed_voice_detector_answers_as_torch_alone_does() -> None:
    import silero_vad

    config = model_config(SILERO, config={"forward_kwargs": {"sr": 16000}})
    loaded = ModelLoader().load(config, "cpu")
    file = Path(silero_vad.__file__).parent / "data" / "silero_vad.jit"
    reference = torch.jit.load(str(file))
    x = torch.sin(torch.arange(512) * 0.3).unsqueeze(0)
    assert torch.equal(loaded.module(x), reference(x, 16000))
    assert loaded.module(x).shape == (1, 1)
    assert 1 < loaded.weights_mb < 4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_ordinary_modules_are_not_suspicious(tmp_path: Path) -> None:
    modules: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "layers": (Layers(), torch.rand(1, 3)),
        "lstm": (nn.LSTM(3, 3), torch.rand(1, 1, 3)),
        "transformer": (nn.TransformerEncoderLayer(4, 2, 8), torch.rand(1, 1, 4)),
        "conv": (nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), torch.rand(1, 3, 4, 4)),
    }
    for name, (module, example) in modules.items():
        for kind in ("script", "trace"):
            path = tmp_path / f"{name}-{kind}.pt"
            module.eval()
            made = (
                torch.jit.script(module) if kind == "script" else torch.jit.trace(module, example)
            )
            torch.jit.save(made, path)
            assert suspicious_code(path) == ()


def test_scripted_weights_can_be_trained(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Layers().requires_grad_(False)), tmp_path / "m.pt")
    module = ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu").module
    module(torch.rand(1, 3)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
