"""Whether memory comes back: a 400 MB model is loaded and unloaded 30 times in one process.

glibc keeps freed memory for itself unless it is asked to hand it back. Printed beside the result: the
same loads with plain `torch.load` and `del`, which is what a server without that does. Then 40 models of
10 to 800 MB, in all forms of weights, one after the other. Free memory is kept for batches as in a node.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.model_kinds import KINDS, write

ROUNDS = 30
ALLOWED_MB = 60
MODELS = 40
SMALL_MB = 10.0

MANAGED = """
import json, sys, psutil
from splitlearn_manager import ModelConfig, ModelManager
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch
keep_for_the_next_batch()
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

COME_AND_GO = """
import json, sys, psutil
from splitlearn_manager import ModelConfig, ModelManager
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch
keep_for_the_next_batch()
manager = ModelManager()
for line in sys.stdin:
    keys = json.loads(line)
    manager.load_model(ModelConfig(device="cpu", **keys))
    manager.unload_model(keys["model_id"])
    print(psutil.Process().memory_info().rss / 2**20, flush=True)
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


def test_forty_models_of_all_sizes_and_forms_come_and_go(tmp_path: Path) -> None:
    rng = random.Random(5)
    sizes_mb = [10 * 80 ** (number / (MODELS - 1)) for number in range(MODELS)]
    rng.shuffle(sizes_mb)
    start_mb, *after_mb = rss_after_each(tmp_path, sizes_mb)
    allowed_mb = 1.05 * start_mb + 30
    print(
        f"\n{MODELS} models of {min(sizes_mb):.0f} to {max(sizes_mb):.0f} MB in {len(KINDS)} forms: "
        f"RSS {start_mb:.0f} MB at the start, {after_mb[-1]:.0f} MB in the end, at most "
        f"{max(after_mb):.0f} MB between two of them; allowed {allowed_mb:.0f} MB"
    )
    assert after_mb[-1] <= allowed_mb


def rss_after_each(directory: Path, sizes_mb: Sequence[float]) -> list[float]:
    """MB at the start, when a small one of each form has come and gone, and after each model."""
    held_mb: list[float] = []
    files = directory / "files"
    with subprocess.Popen(
        [sys.executable, "-c", COME_AND_GO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, size_mb in enumerate([SMALL_MB] * len(KINDS) + list(sizes_mb)):
            keys = write(KINDS[number % len(KINDS)].__name__, files, size_mb)
            if (files / "net.py").exists():
                shutil.copy(files / "net.py", directory)  # where factories are found
            process.stdin.write(json.dumps(keys) + "\n")
            process.stdin.flush()
            held_mb.append(float(process.stdout.readline()))
            shutil.rmtree(files)
        process.stdin.close()
    return held_mb[len(KINDS) - 1 :]
