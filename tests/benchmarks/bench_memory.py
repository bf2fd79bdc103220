"""Whether memory comes back: a 400 MB model is loaded and unloaded 30 times in one process.

glibc keeps freed memory for itself unless it is asked to hand it back. Printed beside the result: the
same loads with plain `torch.load` and `del`, which is what a server without that does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROUNDS = 30
ALLOWED_MB = 60

MANAGED = """
import json, sys, psutil
from splitlearn_manager import ModelConfig, ModelManager
path, rounds = sys.argv[1], int(sys.argv[2])
manager = ModelManager()
held = []
for _ in range(rounds):
    manager.load_model(ModelConfig(model_id="big", model_path=path, device="cpu"))
    manager.unload_model("big")
    held.append(psutil.Process().memory_info().rss / 2**20)
print(json.dumps(held))
"""

PLAIN = """
import json, sys, psutil, torch
from torch import nn
path, rounds = sys.argv[1], int(sys.argv[2])
held = []
for _ in range(rounds):
    model = torch.load(path, weights_only=False)
    with torch.inference_mode():
        model(torch.zeros(1, 10240))
    del model
    held.append(psutil.Process().memory_info().rss / 2**20)
print(json.dumps(held))
"""


def rss_after_each_round(program: str, path: Path) -> list[float]:
    out = subprocess.run(
        [sys.executable, "-c", program, str(path), str(ROUNDS)],
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(out.stdout.splitlines()[-1]))


def test_memory_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    save = (
        "import sys, torch; from torch import nn; torch.save(nn.Linear(10240, 10240), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", save, str(path)], check=True)
    managed = rss_after_each_round(MANAGED, path)
    plain = rss_after_each_round(PLAIN, path)
    growth = managed[-1] - managed[0]
    print(
        f"\nRSS after unloading 400 MB: round 1 {managed[0]:.0f} MB, round {ROUNDS} "
        f"{managed[-1]:.0f} MB (growth {growth:+.0f} MB, most {max(managed) - managed[0]:+.0f} MB)"
        f"\nplain torch.load and del: round 1 {plain[0]:.0f} MB, round {ROUNDS} {plain[-1]:.0f} MB"
    )
    assert max(managed) - managed[0] <= ALLOWED_MB
