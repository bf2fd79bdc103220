"""A model behind Triton: `python triton_server.py PORT`, the model in $PEER_MODEL, its files in $PEER_FILES.

Writes a repository of that one model, run by Triton's python backend, and becomes the `tritonserver` that the
package nvidia-pytriton brings along. One process that computes, with dynamic batching of up to 32 requests
of any shapes and no wait, which is its least.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import models

HERE = Path(__file__).parent
CONFIG = """\
backend: "python"
max_batch_size: 32
dynamic_batching {{ }}
input [ {{ name: "input" data_type: TYPE_FP32 dims: {input} allow_ragged_batch: true }} ]
output [ {{ name: "output" data_type: TYPE_FP32 dims: {output} }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def installed() -> Path:
    """Where the package is; importing it would need all that it depends on."""
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        sys.exit("nvidia-pytriton is not installed: it has no package for this machine")
    return Path(found.origin).parent


def write_model(repository: Path, name: str) -> None:
    tensor = models.inputs(name)[0]
    (answer,) = models.joined(name, getattr(models, name)(), [tensor])
    # The first size is the batch's, and not named.
    sizes = {"input": [-1] * (tensor.dim() - 1), "output": [-1] * (answer.dim() - 1)}
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(**sizes))
    shutil.copy(HERE / "triton_model.py", repository / name / "1" / "model.py")


def write_backend(backends: Path, triton: Path) -> None:
    """The python backend with the stub of this Python's version."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(triton / "backends" / "python", backends / "python")
    stub = triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python" / stub.name)
    (backends / "python" / stub.name).chmod(0o755)


def main(port: str, files: Path) -> None:
    package = installed()
    triton = package / "tritonserver"
    write_model(files / "repository", os.environ["PEER_MODEL"])
    write_backend(files / "backends", triton)
    libraries = [str(package.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        # The stub finds its environment by the first `python3` there, and libpython by the libraries' path.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONPATH": str(HERE),
    }
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={files / 'repository'}",
        f"--backend-directory={files / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--exit-timeout-secs=5",
    ]
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1], Path(os.environ["PEER_FILES"]))
