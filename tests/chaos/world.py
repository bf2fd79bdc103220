"""A desired directory that a writer keeps changing, and what a node may serve from it.

The writer knows every byte that it wrote. For each model it remembers which versions may be the last one
that served: those it wrote since the version that last answered a request. So what a node must serve once
the files are left alone follows from the files and from that memory, whatever the node was doing when it
was killed:

    the file is valid       exactly what it says
    it is broken            the last version that was accepted
    its model cannot load   the version that served last
    it is gone              nothing

Whose a broken file is, a node knows by its name, if the model was accepted from a file of that name, or by
its text. One that got another name and is empty tells neither: its model may be kept, or go.

Versions tell who they are: a model answers its own number everywhere.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.served import WIDTH, replace_file, save_version

FACTORY = """
import torch
from torch import nn


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x):
        return x * 0 + self.value


def constant(value=1.0, fails=False):
    if fails:
        raise RuntimeError("told to fail")
    return Constant(value)
"""

BROKEN = (
    "",
    "model_id: {id}\n",
    "model_id: {id}\nmodel_path: [nets:constant\n",
    "model_id: {id}\nmodel_path: nets:constant\nbatch_size: many\n",
    "model_id: {id}\nmodel_path: nets:constant\nmax_memroy_mb: 3\n",
    "\x00\x01 {id}",
)

WEIGHTS = "weights"
MOST_GONE = 2


@dataclass(frozen=True)
class Version:
    """What a valid file says.

    Attributes:
        value: the model's answer; no two versions of a world share one.
        fails: its factory raises.
    """

    value: int
    priority: int = 0
    fails: bool = False

    def text(self, model_id: str) -> str:
        options = {"input_shape": [1, WIDTH], "kwargs": {"value": self.value, "fails": self.fails}}
        keys = {
            "model_id": model_id,
            "priority": self.priority,
            "config": options,
            "device": "cpu",
            "model_path": "nets:constant",
        }
        return "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())


@dataclass
class Model:
    """One id, its file, and what may have served last.

    Attributes:
        path: where its file is, or would be.
        says: what the file says; None while it is broken or gone.
        gone: there is no file.
        candidates: values that may be the last that served, oldest first; None stands for nothing.
        edits: how often it was changed.
        deletions: how often it was deleted, or nothing told any more whose file it is.
        broken: what the file says while it is broken.
        known: the model was accepted from a file of this name.
        proof: the value whose answer proves that; None if none does.
    """

    path: Path
    says: Version | None = None
    gone: bool = True
    candidates: list[int | None] = field(default_factory=lambda: [None])
    edits: int = 0
    deletions: int = 0
    broken: str = ""
    known: bool = False
    proof: int | None = None

    @property
    def expected(self) -> set[int | None]:
        """What may serve once the files are left alone."""
        if self.gone:
            return {None}
        if self.says is not None and not self.says.fails:
            return {self.says.value}
        return set(self.candidates)

    def answered(self, value: int | None) -> bool:
        """A request was answered by that version: what came before it is over.

        That nothing answers proves something only while there is no file: else it may be on its way.

        Returns:
            whether the version may have answered.
        """
        if value not in self.candidates:
            return False
        self.known = self.known or (value is not None and value == self.proof)
        if value is not None or self.gone:
            last = len(self.candidates) - 1 - self.candidates[::-1].index(value)
            self.candidates = self.candidates[last:]
        return True

    def may_be_taken_for_gone(self, model_id: str) -> bool:
        """Nothing tells whose file it is."""
        return (
            not self.gone and self.says is None and not self.known and model_id not in self.broken
        )


class World:
    """A directory, its models, and the operations of a writer. `lock` guards what the models know."""

    def __init__(self, directory: Path, seed: int, models: int = 6) -> None:
        self.directory = directory
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.operations: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=60)
        self._versions = 0
        self._pause = threading.Event()
        directory.mkdir(parents=True)
        replace_file(directory / "nets.py", FACTORY)
        self.models = {f"m{n}": Model(directory / f"m{n}.yaml") for n in range(models)}
        self.weights_version = 1
        save_version(directory / "weights.pt", 1)
        replace_file(
            directory / "weights.yaml",
            f"model_id: {WEIGHTS}\nmodel_path: weights.pt\ndevice: cpu\n",
        )
        for model_id in self.models:
            self._write(model_id, self._new_version())

    @property
    def ids(self) -> list[str]:
        return [*self.models, WEIGHTS]

    def expected(self, model_id: str) -> set[int | None]:
        """What may serve once the files are left alone; of the weights, their version."""
        with self.lock:
            if model_id == WEIGHTS:
                return {self.weights_version}
            return self.models[model_id].expected

    def state_of(self, model_id: str) -> str:
        """What its file is: `valid`, `broken`, `gone`, or valid for a version that `fails` to load."""
        with self.lock:
            model = self.models.get(model_id)
            if model is None:
                return "valid"
            if model.gone:
                return "gone"
            if model.says is None:
                return "broken"
            return "fails" if model.says.fails else "valid"

    def is_at_rest(self, model_id: str) -> None:
        """Tells that a node has seen all files as they are."""
        with self.lock:
            model = self.models.get(model_id)
            if model is not None and model.says is not None:
                model.known = True

    def answered(self, model_id: str, value: int | None) -> bool:
        """Tells that the version served, at some moment until this call; whether it may have."""
        with self.lock:
            if model_id == WEIGHTS:
                return value is None or 0 < value <= self.weights_version
            return self.models[model_id].answered(value)

    def act(self, confirmed: Callable[[str, int], bool]) -> None:
        """One random operation.

        Args:
            confirmed: waits for a while until the model has answered with that value.
        """
        model_id = self.rng.choice(list(self.models))
        model = self.models[model_id]
        choices: list[tuple[str, Callable[[], None]]] = [
            ("replace", lambda: self._write(model_id, self._new_version())),
            ("in place", lambda: self._write_slowly(model_id, self._new_version())),
            ("prioritise", lambda: self._prioritise(model_id)),
            ("weights", self._write_weights),
        ]
        if not model.gone:
            choices += [
                ("break", lambda: self._break(model_id, confirmed)),
                ("break", lambda: self._break(model_id, confirmed)),
                ("fail", lambda: self._write(model_id, self._new_version(fails=True))),
                ("move", lambda: self._move(model_id)),
                ("touch", lambda: os.utime(model.path)),
            ]
            if sum(m.gone for m in self.models.values()) < MOST_GONE:
                choices.append(("delete", lambda: self._delete(model_id)))
            if model.says is not None:
                choices.append(("double", lambda: self._double(model_id)))
        name, operation = self.rng.choice(choices)
        self.operations[name] += 1
        self.recent.append(f"{name} {model_id}")
        operation()

    # -- operations

    def _new_version(self, *, fails: bool = False) -> Version:
        self._versions += 1
        return Version(self._versions, self.rng.randrange(3), fails)

    def _says(self, model_id: str, version: Version) -> None:
        """Noted before it is written: a node may accept it before the write has returned."""
        with self.lock:
            model = self.models[model_id]
            if not version.fails and (model.says is None or model.says.value != version.value):
                model.proof = version.value
            model.says, model.gone = version, False
            model.edits += 1
            if not version.fails and model.candidates[-1] != version.value:
                model.candidates.append(version.value)
        self.recent.append(f"  {model_id} says {version}")

    def _write(self, model_id: str, version: Version) -> None:
        self._says(model_id, version)
        replace_file(self.models[model_id].path, version.text(model_id))

    def _write_slowly(self, model_id: str, version: Version) -> None:
        """In place, in two parts; the first ends inside a value, so it can be no whole file."""
        self._says(model_id, version)
        text = version.text(model_id)
        half = text.index('"kwargs"') + 5
        with self.models[model_id].path.open("w") as file:
            file.write(text[:half])
            file.flush()
            self._pause.wait(self.rng.choice((0.0, 0.05, 0.3)))
            file.write(text[half:])

    def _prioritise(self, model_id: str) -> None:
        says = self.models[model_id].says
        if says is not None:
            self._write(model_id, Version(says.value, says.priority + 1, says.fails))

    def _break(self, model_id: str, confirmed: Callable[[str, int], bool]) -> None:
        """Often only once the file's version is known to serve: then there is but one right answer."""
        says = self.models[model_id].says
        if says is not None and not says.fails and self.rng.random() < 0.7:
            confirmed(model_id, says.value)
        text = self.rng.choice(BROKEN).format(id=model_id)
        with self.lock:
            model = self.models[model_id]
            model.says, model.broken = None, text
            model.edits += 1
            self._note_doubt(model_id)
        if self.rng.random() < 0.5:
            replace_file(model.path, text)
        else:
            model.path.write_text(text)
        self.recent.append(f"  {model_id} is broken: {text[:40]!r}")

    def _delete(self, model_id: str) -> None:
        with self.lock:
            model = self.models[model_id]
            model.says, model.gone = None, True
            model.edits += 1
            model.deletions += 1
            model.candidates.append(None)
            model.known, model.proof = False, None
        model.path.unlink()

    def _move(self, model_id: str) -> None:
        model = self.models[model_id]
        target = self.directory / f"{model_id}-{self.rng.randrange(1000)}.yml"
        with self.lock:
            model.known, model.proof = False, None
            self._note_doubt(model_id)
        os.rename(model.path, target)
        model.path = target

    def _note_doubt(self, model_id: str) -> None:
        model = self.models[model_id]
        if model.may_be_taken_for_gone(model_id) and model.candidates[-1] is not None:
            model.candidates.append(None)
            model.deletions += 1

    def _double(self, model_id: str) -> None:
        """For a moment two files declare the model; neither is to be believed."""
        double = self.directory / f"double-of-{model_id}.yaml"
        replace_file(double, self._new_version().text(model_id))
        self._pause.wait(self.rng.choice((0.05, 0.4)))
        double.unlink()

    def _write_weights(self) -> None:
        with self.lock:
            self.weights_version += 1
        path = self.directory / "weights.pt"
        save_version(path, self.weights_version)
