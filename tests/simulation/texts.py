"""What files may say: model documents in spellings that mean the same, and things that are no document.

Few models, few values: the texts repeat, so that each is parsed once a process (`remembered_parsing`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from simulation.patching import patched
from splitlearn_manager.config import model_source
from splitlearn_manager.config.yaml_source import ParsedModels, parse_models
from splitlearn_manager.desired import reading
from splitlearn_manager.desired.tracked_file import Reading

IDS = ("m0", "m1", "m2", "m3", "m4")
ROOT = "/desired"

KEYS: dict[str, tuple[object, ...]] = {
    "v": (1, 2, 3),
    "priority": (1, 2),
    "pinned": ("true",),
    "update": ("surge", "recreate"),
    "keep_alive_s": (3, 20),
    "rollout": (
        "{canary: [{percent: 50, for_s: 0}], min_requests: 0}",
        "{canary: [{percent: 5, for_s: 2}, {percent: 50, for_s: 8}], min_requests: 0}",
        "{shadow: {percent: 20, for_s: 4}, min_requests: 0}",
        "{shadow: {percent: 100, for_s: 9}, min_requests: 0}",
    ),
    "max_memory_mb": (15, 40),
    "batch_size": (1, 64, 128),
    "endpoint": ("shared",),
    "device": ("cpu", "auto", "cuda:0"),
    "load_timeout_s": (3, 40),
    "drain_timeout_s": (2,),
    "weights": ("/weights/shared.pt", "/weights/dir", "/weights/link.pt", "/weights/nothing.pt"),
    "fail": ("fail", "terminal"),
}
"""Values that a document may have where it differs from the plain one."""


@dataclass(frozen=True)
class Doc:
    """One model's document: what is not in `keys` is as in every plain document."""

    model_id: str
    keys: tuple[tuple[str, object], ...] = ()

    def lines(self) -> list[str]:
        keys = dict(self.keys)
        kwargs = {k: keys.pop(k) for k in ("v", "fail") if k in keys}
        values: dict[str, object] = {
            "model_id": self.model_id,
            "model_path": keys.pop("weights", f"/weights/{self.model_id}.pt"),
            "device": keys.pop("device", "cpu"),
            "load_timeout_s": keys.pop("load_timeout_s", 6),
            **keys,
        }
        if "shadow" in str(keys.get("rollout")):
            values["verify"] = "{max_difference: 1}"
        if kwargs:
            inner = ", ".join(f"{k}: {v}" for k, v in kwargs.items())
            values["config"] = f"{{kwargs: {{{inner}}}}}"
        return [f"{key}: {value}" for key, value in values.items()]

    def __str__(self) -> str:
        return " ".join([self.model_id, *(f"{k}={v}" for k, v in self.keys)])


def plain(doc: Doc) -> str:
    return "\n".join(doc.lines()) + "\n"


def commented(doc: Doc) -> str:
    return f"# why\n{plain(doc)}# end\n"


def reordered(doc: Doc) -> str:
    return "\n\n".join(reversed(doc.lines())) + "\n"


def flow(doc: Doc) -> str:
    return f"{{{', '.join(doc.lines())}}}\n"


SPELLINGS: dict[str, Callable[[Doc], str]] = {
    "": plain,
    "commented": commented,
    "reordered": reordered,
    "in flow style": flow,
}

BROKEN: dict[str, Callable[[str], str]] = {
    "nothing": lambda model_id: "",
    "half a sequence": lambda model_id: f"model_id: {model_id}\nmodel_path: [\n",
    "a misspelt key": lambda model_id: f"{plain(Doc(model_id))}max_memroy_mb: 5\n",
    "a value of the wrong type": lambda model_id: f"{plain(Doc(model_id))}max_memory_mb: 4gb\n",
    "no model_path": lambda model_id: f"model_id: {model_id}\n",
    "something else": lambda model_id: "hello: world\n",
    "a tab": lambda model_id: f"model_id: {model_id}\n\tmodel_path: /w\n",
}


@dataclass(frozen=True)
class Text:
    """The content of a file, and what to call it in a trace."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name

    def cut(self, share: float) -> Text:
        """Its beginning, as a writer leaves it that was stopped half way."""
        length = max(1, int(len(self.data) * share)) if self.data else 0
        return Text(self.data[:length], f"the first {length} bytes of [{self.name}]")


def text_of(docs: Iterable[Doc], spelling: str = "") -> Text:
    """Documents, one after the other, in a spelling."""
    docs = tuple(docs)
    data = "---\n".join(SPELLINGS[spelling](doc) for doc in docs).encode()
    name = " + ".join(str(doc) for doc in docs) + (f" ({spelling})" if spelling else "")
    return Text(data, name)


def broken_text(what: str, model_id: str) -> Text:
    return Text(BROKEN[what](model_id).encode(), f"{model_id} with {what}")


def some_doc(rng: Random, model_id: str, keys: Iterable[str]) -> Doc:
    """A document with up to two of the given keys set."""
    available = sorted(keys)
    chosen = rng.sample(available, min(len(available), rng.choice((0, 1, 1, 2))))
    return Doc(model_id, tuple((key, rng.choice(KEYS[key])) for key in sorted(chosen)))


def server_text(**keys: object) -> Text:
    lines = [f"{key}: {value}" for key, value in keys.items()]
    words = " ".join(f"{key}={value}" for key, value in keys.items())
    return Text(("\n".join(lines) + "\n").encode(), words)


# -- what a text means


@dataclass(frozen=True)
class Meaning:
    """What some bytes declare.

    Attributes:
        specs: for each id that a valid document declares, the spec hashes, one a document.
        faulty: that is not all that they say.
        invalid_ids: ids that documents with mistakes name.
    """

    specs: dict[str, tuple[str, ...]]
    faulty: bool
    invalid_ids: frozenset[str]


@functools.lru_cache(maxsize=200_000)
def meaning(directory: str, data: bytes) -> Meaning:
    """What the bytes of a file in `directory` mean, asked of the parser alone."""
    parsed = _parse(data, Path(directory))
    specs: dict[str, tuple[str, ...]] = {}
    for model in parsed.models:
        model_id = model.config.model_id
        specs[model_id] = (*specs.get(model_id, ()), model.config.spec_hash())
    return Meaning(specs, bool(parsed.problems), parsed.invalid_ids)


@functools.lru_cache(maxsize=200_000)
def _parse(data: bytes, base_dir: Path | None) -> ParsedModels:
    return parse_models(data, file="f", base_dir=base_dir)


def _parse_once(data: bytes, *, file: str, base_dir: Path | None) -> ParsedModels:
    parsed = _parse(data, base_dir)
    if not parsed.problems:
        return parsed
    return replace(parsed, problems=tuple(replace(p, file=file) for p in parsed.problems))


_read_anew = reading.ModelParser.__call__
_path_once = functools.lru_cache(maxsize=10_000)(model_source.parse_model_path)
_server_once = functools.lru_cache(maxsize=10_000)(reading.parse_server)


@functools.lru_cache(maxsize=200_000)
def _read_once(root: Path | None, path: str, data: bytes) -> Reading:
    return _read_anew(reading.ModelParser(root), path, data)


@contextmanager
def remembered_parsing() -> Iterator[None]:
    """Equal bytes are parsed once a process: what they mean does not depend on anything else."""

    def read(parser: reading.ModelParser, path: str, data: bytes) -> Reading:
        return _read_once(parser._root, path, data)

    with (
        patched(reading.ModelParser, "__call__", read),
        patched(reading, "parse_models", _parse_once),
        patched(reading, "parse_server", _server_once),
        patched(model_source, "parse_model_path", _path_once),
    ):
        yield
