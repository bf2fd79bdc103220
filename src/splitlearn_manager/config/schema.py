"""JSON Schemas of the two kinds of file, for editors that complete and check YAML.

Made from the models themselves, so that they cannot drift apart; a value that this version refuses is
no valid value in the schema either. What a schema cannot say (one model_id a file, the forms of
model_path) only `validate` checks.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, JsonValue

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.not_yet import MODEL_NOT_YET, SERVER_NOT_YET, NotYet
from splitlearn_manager.config.server_config import ServerConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, JsonValue]


def model_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of one document of a model's file."""
    return _schema(ModelConfig, "A model to serve", MODEL_NOT_YET)


def server_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of server.yaml."""
    return _schema(ServerConfig, "The node that serves the models", SERVER_NOT_YET)


def _schema(model: type[BaseModel], title: str, not_yet: Mapping[str, NotYet]) -> Schema:
    schema: Schema = {"$schema": DIALECT, **model.model_json_schema()}
    for part in (schema, *_maps(schema.get("$defs"))):
        part.pop("description", None)
        for key, value in _properties(part).items():
            value.pop("title", None)
            value["description"] = _one_line(value.get("description"))
            if "patternProperties" in value:
                value["additionalProperties"] = False
            if "$ref" in value:
                value["default"] = {}
            if part is schema and key in not_yet:
                _restrict(value, not_yet[key])
    return schema | {"title": title}


def _properties(part: Schema) -> dict[str, Schema]:
    properties = part.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {key: value for key, value in properties.items() if isinstance(value, dict)}


def _maps(definitions: JsonValue) -> list[Schema]:
    if not isinstance(definitions, dict):
        return []
    return [value for value in definitions.values() if isinstance(value, dict)]


def _restrict(value: Schema, row: NotYet) -> None:
    """Leave only the values that work, and say what the others wait for."""
    description, default = value["description"], value["default"]
    value.clear()
    value["description"] = f"{description} This version cannot {row.missing} yet."
    value["default"] = default
    value["enum"] = list(row.works)


def _one_line(description: JsonValue) -> str:
    return " ".join(str(description).split())
