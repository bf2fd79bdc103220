"""The first models of a process may be loaded side by side, whatever torch sets up at its first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
