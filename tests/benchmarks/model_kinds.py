"""Files of one model in every form that can be loaded, for the benchmarks of loading and of memory.

Run as a program it writes one of them: `python model_kinds.py KIND DIRECTORY MB`, and prints the config that
loads it as JSON. A process of its own, so that making the file leaves nothing behind in what is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

WIDTH = 2048
LAYER_MB = WIDTH * WIDTH * 4 / 2**20

FACTORY = f"""
from torch import nn

def build(layers: int, half: bool = False) -> nn.Module:
    parts = []
    for _ in range(layers):
        parts += [nn.Linear({WIDTH}, {WIDTH}), nn.ReLU()]
    net = nn.Sequential(*parts)
    return net.half() if half else net
"""

Keys = dict[str, Any]


def layers_of(mb: float) -> int:
    return max(1, round(mb / LAYER_MB))


def network(mb: float) -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    built: nn.Module = namespace["build"](layers_of(mb))
    return built.eval()


def _with_factory(directory: Path, mb: float, **more: Any) -> Keys:
    (directory / "net.py").write_text(FACTORY)
    kwargs = {"layers": layers_of(mb), **more.pop("kwargs", {})}
    return {"config": {"factory": "net:build", "kwargs": kwargs, **more}}


def whole_module(directory: Path, mb: float) -> Keys:
    import torch

    torch.save(network(mb), directory / "m")
    return {}


def whole_module_to_bfloat16(directory: Path, mb: float) -> Keys:
    return whole_module(directory, mb * 2) | {"config": {"dtype": "bfloat16"}}


def trusted_module(directory: Path, mb: float) -> Keys:
    return whole_module(directory, mb) | {"trusted": True}


def state_dict(directory: Path, mb: float) -> Keys:
    import torch

    torch.save(network(mb).state_dict(), directory / "m")
    return _with_factory(directory, mb)


def state_dict_of_a_training(directory: Path, mb: float) -> Keys:
    import torch

    weights = network(mb).state_dict()
    moments = {name: (w.clone(), w.clone()) for name, w in weights.items()}
    torch.save({"model": weights, "optimizer": moments}, directory / "m")
    return _with_factory(directory, mb)


def state_dict_trusted(directory: Path, mb: float) -> Keys:
    return state_dict(directory, mb) | {"trusted": True}


def state_dict_to_bfloat16(directory: Path, mb: float) -> Keys:
    import torch

    torch.save(network(mb * 2).state_dict(), directory / "m")
    return _with_factory(directory, mb * 2, dtype="bfloat16")


def state_dict_into_half(directory: Path, mb: float) -> Keys:
    import torch

    torch.save(network(mb * 2).state_dict(), directory / "m")
    return _with_factory(directory, mb * 2, kwargs={"half": True})


def state_dict_before_1_6(directory: Path, mb: float) -> Keys:
    import torch

    torch.save(network(mb).state_dict(), directory / "m", _use_new_zipfile_serialization=False)
    return _with_factory(directory, mb)


def module_before_1_6(directory: Path, mb: float) -> Keys:
    import torch

    torch.save(network(mb), directory / "m", _use_new_zipfile_serialization=False)
    return {"trusted": True}


def safetensors(directory: Path, mb: float) -> Keys:
    from safetensors.torch import save_file

    save_file(network(mb).state_dict(), directory / "m")
    return _with_factory(directory, mb)


def safetensors_to_bfloat16(directory: Path, mb: float) -> Keys:
    from safetensors.torch import save_file

    save_file(network(mb * 2).state_dict(), directory / "m")
    return _with_factory(directory, mb * 2, dtype="bfloat16")


def torchscript(directory: Path, mb: float) -> Keys:
    import torch

    torch.jit.save(torch.jit.script(network(mb)), str(directory / "m"))
    return {}


def exported(directory: Path, mb: float) -> Keys:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network(mb), (torch.zeros(1, WIDTH),))
        torch.export.save(program, directory / "m.pt2")
    (directory / "m.pt2").rename(directory / "m")
    return {"trusted": True, "config": {"input_shape": [1, WIDTH]}}


def huggingface(directory: Path, mb: float, **save: Any) -> Keys:
    from transformers import BertConfig, BertModel

    hidden, feed_forward, words = 768, 3072, 10_000
    layer_mb = (4 * hidden * hidden + 2 * hidden * feed_forward) * 4 / 2**20
    rest_mb = (words + 512) * hidden * 4 / 2**20
    model = BertModel(
        BertConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_hidden_layers=max(1, round((mb - rest_mb) / layer_mb)),
            num_attention_heads=12,
            intermediate_size=feed_forward,
        )
    )
    if save.pop("pickled", False):
        import torch

        model.config.save_pretrained(directory / "m")
        torch.save(model.state_dict(), directory / "m" / "pytorch_model.bin")
    else:
        model.save_pretrained(directory / "m", **save)
    return {}


def huggingface_in_shards(directory: Path, mb: float) -> Keys:
    return huggingface(directory, mb, max_shard_size=f"{max(1, round(mb / 4))}MB")


def huggingface_to_bfloat16(directory: Path, mb: float) -> Keys:
    return huggingface(directory, mb * 2) | {"config": {"dtype": "bfloat16"}}


def huggingface_pickled(directory: Path, mb: float) -> Keys:
    return huggingface(directory, mb, pickled=True)


def huggingface_pickled_to_bfloat16(directory: Path, mb: float) -> Keys:
    return huggingface(directory, mb * 2, pickled=True) | {"config": {"dtype": "bfloat16"}}


KINDS: tuple[Callable[[Path, float], Keys], ...] = (
    whole_module,
    whole_module_to_bfloat16,
    trusted_module,
    module_before_1_6,
    state_dict,
    state_dict_trusted,
    state_dict_of_a_training,
    state_dict_to_bfloat16,
    state_dict_into_half,
    state_dict_before_1_6,
    safetensors,
    safetensors_to_bfloat16,
    huggingface,
    huggingface_in_shards,
    huggingface_to_bfloat16,
    huggingface_pickled,
    huggingface_pickled_to_bfloat16,
    torchscript,
    exported,
)


def write(kind: str, directory: Path, mb: float) -> Keys:
    """Write the files of a kind whose weights take about `mb` once loaded.

    Returns:
        The keys of the config that loads them; `model_path` is `DIRECTORY/m`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    out = subprocess.run(
        [sys.executable, __file__, kind, str(directory), str(mb)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(out.stdout.splitlines()[-1]))


if __name__ == "__main__":
    _, wanted, where, size = sys.argv
    make = next(kind for kind in KINDS if kind.__name__ == wanted)
    keys = {"model_id": "m", "model_path": str(Path(where) / "m"), **make(Path(where), float(size))}
    print(json.dumps(keys))
