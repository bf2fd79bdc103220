"""The JSON Schemas that editors get."""

from __future__ import annotations

import json

import pytest

from splitlearn_manager.config.loader_options import LoaderOptions
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.schema import Schema, model_schema, server_schema
from splitlearn_manager.config.server_config import ServerConfig


def properties(schema: object) -> dict[str, Schema]:
    assert isinstance(schema, dict)
    found = schema["properties"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("schema", [model_schema(), server_schema()])
def test_schema_is_closed_and_plain_json(schema: Schema) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema


def test_every_key_is_there_with_a_description() -> None:
    schema = model_schema()
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    options = definitions["LoaderOptions"]
    assert isinstance(options, dict)
    assert options["additionalProperties"] is False
    for keys, expected in (
        (properties(schema), ModelConfig.model_fields),
        (properties(options), LoaderOptions.model_fields),
        (properties(server_schema()), ServerConfig.model_fields),
    ):
        assert list(keys) == list(expected)
        for key, value in keys.items():
            description = value["description"]
            assert isinstance(description, str)
            assert len(description) > 20, key
            assert "\n" not in description
    assert schema["required"] == ["model_id", "model_path"]


def test_quotas_are_for_known_devices_only() -> None:
    quota = properties(server_schema())["memory_quota_mb"]
    assert quota["additionalProperties"] is False
    assert quota["patternProperties"]
