"""Prints a JSON schema for editors, made from the schema of the files in configs/:

    python scripts/config_schema.py run > configs/schema.json
    python scripts/config_schema.py experiment > configs/experiments/schema.json
    python scripts/config_schema.py cluster > configs/clusters/schema.json

It knows keys, types, limits and descriptions; rules between keys are checked when the file is read.
"""

import json
import sys
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from tdds_dist.config.experiment import Experiment
from tdds_dist.config.grid import BUILT_IN_METHODS
from tdds_dist.config.run import Config
from tdds_dist.config.schema import Section
from tdds_dist.launch.cluster import _OF_THE_WHOLE, Cluster

ROOTS: dict[str, type[Section]] = {"run": Config, "experiment": Experiment, "cluster": Cluster}
# 5e-4: a number here, and text for tools that read YAML 1.1 to the letter
EXPONENT = r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"


class _Generate(GenerateJsonSchema):
    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"type": "string", "pattern": EXPONENT}]}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema of a kind of file: run, experiment or cluster."""
    tree = ROOTS[kind].model_json_schema(schema_generator=_Generate)
    tree = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _tidied(tree)
    # What validators of the models take beside the type of the field.
    if kind == "run":
        never_learned = tree["$defs"]["Baselines"]["properties"]["never_learned"]
        never_learned["enum"] += [0]
        del never_learned["type"]
    if kind == "experiment":
        tree["properties"]["methods"]["items"] = {
            "anyOf": [{"enum": list(BUILT_IN_METHODS)}, {"$ref": "#/$defs/Method"}]
        }
    if kind == "cluster":
        of_stage = {
            name: value for name, value in tree["properties"].items() if name not in _OF_THE_WHOLE
        }
        tree["$defs"] = {
            "Stage": {"type": "object", "properties": of_stage, "additionalProperties": False}
        }
        tree["properties"]["stages"]["additionalProperties"] = {"$ref": "#/$defs/Stage"}
    return tree


def _tidied(value: Any) -> Any:
    """Leave out titles, which are the names of the keys again, and line ends in descriptions."""
    if isinstance(value, dict):
        return {
            key: " ".join(item.split())
            if key == "description" and isinstance(item, str)
            else _tidied(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    return [_tidied(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    print(json.dumps(schema_of(sys.argv[1]), indent=1, ensure_ascii=False))
