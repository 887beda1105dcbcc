"""Check the manifests in configs/cluster against the schemas of their operators.

    python scripts/check_manifests.py CRD [CRD ...]

CRD is a file with a CustomResourceDefinition. JobSet's repository has it in
``config/components/crd/bases``, KubeRay's in ``ray-operator/config/crd/bases``. Fields that a
schema does not know are faults, as ``kubectl apply --validate=strict`` sees them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

MANIFESTS = Path(__file__).parent.parent / "configs" / "cluster"


def main() -> int:
    """Print a line for each manifest and fault; 1 if there is a fault or nothing was checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("crds", nargs="+", type=Path)
    schemas = {}
    for path in parser.parse_args().crds:
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
        names, group = definition["spec"]["names"], definition["spec"]["group"]
        for version in definition["spec"]["versions"]:
            key = (f"{group}/{version['name']}", names["kind"])
            schemas[key] = strict(version["schema"]["openAPIV3Schema"])
    checked = faults = 0
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            key = (document["apiVersion"], document["kind"])
            if key not in schemas:
                print(f"no schema  {path.name}: {' '.join(key)}")
                continue
            checked += 1
            errors = list(Draft202012Validator(schemas[key]).iter_errors(document))
            print(f"{'ok' if not errors else 'FAULT':10} {path.name}: {' '.join(key)}")
            for error in errors:
                faults += 1
                print(f"           {error.json_path}: {error.message[:200]}")
    return 1 if faults or not checked else 0


def strict(schema: Any) -> Any:
    """Return a JSON schema that refuses unknown fields, from one of Kubernetes'."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        found.pop("type", None)
    is_open = "additionalProperties" in schema
    is_open = is_open or schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if not is_open and "metadata" not in schema.get("required", ()):
            found["additionalProperties"] = False
        if "apiVersion" in schema["properties"] and "metadata" in schema["properties"]:
            found["properties"]["metadata"] = {"type": "object"}
    return found


if __name__ == "__main__":
    sys.exit(main())
