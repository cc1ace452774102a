"""Checks manifests strictly against the schemas of Kubernetes and of the operators; run by the Python of `.wisp/tools`.

Reads a manifest in JSON from each line and prints a line for it: the list of its problems, in JSON too. One process
checks many manifests, because the schemas take seconds to load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as monitoring
from pydantic import ValidationError

KUBERNETES = ("1.31", "1.34", "1.37")
"""The oldest supported version, one between, and the newest with schemas."""
MODELS = {
    "keda.sh/v1alpha1": keda,
    "monitoring.coreos.com/v1": monitoring,
}
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
ANY = {"type": "object"}


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def resource(spec: dict[str, Any]) -> dict[str, Any]:
    """A custom resource."""
    return closed("apiVersion", "kind", "metadata", "spec", apiVersion=TEXT, kind=TEXT, metadata=ANY, spec=spec)


# No package has these two operators' schemas; here is of them what the manifests use.
SCHEMAS = {
    "rabbitmq.com/v1beta1": resource(
        closed(
            replicas=NUMBER,
            image=TEXT,
            resources=closed(requests=ANY, limits=ANY),
            persistence=closed(storage=TEXT, storageClassName=TEXT),
            tls=closed(secretName=TEXT, caSecretName=TEXT, disableNonTLSListeners=FLAG),
            terminationGracePeriodSeconds=NUMBER,
            rabbitmq=closed(
                additionalConfig=TEXT, advancedConfig=TEXT, additionalPlugins={"type": "array", "items": TEXT}
            ),
        )
    ),
    "redis.redis.opstreelabs.in/v1beta2": resource(
        closed(
            "kubernetesConfig",
            kubernetesConfig=closed(
                "image",
                image=TEXT,
                imagePullPolicy=TEXT,
                redisSecret=closed("name", "key", name=TEXT, key=TEXT),
                resources=closed(requests=ANY, limits=ANY),
            ),
            podSecurityContext=ANY,
            TLS=closed("secret", ca=TEXT, cert=TEXT, key=TEXT, secret=closed("secretName", secretName=TEXT)),
            storage=closed(volumeClaimTemplate=ANY),
        )
    ),
}


def problems(document: dict[str, Any]) -> Iterator[str]:
    """Return the problems of one manifest."""
    version = document["apiVersion"]
    if version in MODELS:
        kind = getattr(MODELS[version], document["kind"], None)
        if kind is None:
            yield f"{version} has no such kind"
            return
        try:
            model = kind.model_validate(document)
        except ValidationError as error:
            yield from (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        else:
            # The models take fields that they do not know and drop them.
            kept = model.model_dump(by_alias=True, mode="json", exclude_none=True)
            yield from (f"unknown field {path}" for path in lost(document, kept))
    elif version in SCHEMAS:
        for error in jsonschema.Draft202012Validator(SCHEMAS[version]).iter_errors(document):
            yield f"{error.json_path}: {error.message}"
    else:
        for kubernetes in KUBERNETES:
            try:
                kubernetes_validate.validate(document, kubernetes, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"Kubernetes {kubernetes}: {'.'.join(map(str, error.path))}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"Kubernetes {kubernetes}: {error.message}"


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Return the paths that are in `given` but not in `kept`."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{path}.{key}"
            else:
                yield from lost(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list):
        for index, value in enumerate(given):
            if not isinstance(kept, list) or index >= len(kept):
                yield f"{path}[{index}]"
            else:
                yield from lost(value, kept[index], f"{path}[{index}]")


if __name__ == "__main__":
    # The package parses a schema's files again for every manifest, which takes most of its time.
    kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)
    for line in sys.stdin:
        document = json.loads(line)
        print(json.dumps([f"{document['kind']}/{document['metadata']['name']}: {one}" for one in problems(document)]))
