"""JSON Schemas of the two kinds of file, for editors that complete and check YAML.

Made from the models themselves, so that they cannot drift apart; a value that this version refuses is
no valid value in the schema either. What a schema cannot say (one model_id a file, the forms of
model_path) only `validate` checks.
"""

from __future__ import annotations

from pydantic import BaseModel, JsonValue

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, JsonValue]


def model_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of one document of a model's file."""
    return _schema(ModelConfig, "A model to serve")


def server_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of server.yaml."""
    return _schema(ServerConfig, "The node that serves the models")


def _schema(model: type[BaseModel], title: str) -> Schema:
    schema: Schema = {"$schema": DIALECT, **model.model_json_schema()}
    for part in (schema, *_maps(schema.get("$defs"))):
        part.pop("description", None)
        for value in _properties(part).values():
            value.pop("title", None)
            value["description"] = _one_line(value.get("description"))
            if "patternProperties" in value:
                value["additionalProperties"] = False
            if "$ref" in value:
                value["default"] = {}
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


def _one_line(description: JsonValue) -> str:
    return " ".join(str(description).split())
