"""Check jobset.yaml against the JobSet schema, and that its numbers and names agree.

    python experiments/cluster/check_jobset.py                            our part of the schema
    python experiments/cluster/check_jobset.py --crd jobsets.yaml         the project's full one

One second. Expected: "jobset.yaml: valid …". FILE for --crd is the custom resource definition that
kubernetes-sigs/jobset keeps under config/components/crd/bases. PyYAML and jsonschema come with the
extra `test`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

HERE = Path(__file__).parent


def schema_errors(manifest: object, schema: dict[str, Any]) -> list[str]:
    """Say where a manifest departs from a JSON schema, one line each."""
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{'.'.join(map(str, error.absolute_path)) or 'the manifest'}: {error.message}"
        for error in sorted(validator.iter_errors(manifest), key=lambda e: list(map(str, e.path)))
    ]


def agreement_errors(manifest: dict[str, Any]) -> list[str]:
    """Check what a schema cannot say: counts, the coordinator's name and its port agree."""
    spec, name = manifest["spec"], manifest["metadata"]["name"]
    job = spec["replicatedJobs"][0]
    pods = job["template"]["spec"]
    container = pods["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
    subdomain = spec.get("network", {}).get("subdomain", name)
    ports = [port["containerPort"] for port in container.get("ports", [])]
    expected = [f"{name}-{job['name']}-0-0.{subdomain}:{port}" for port in ports]
    errors = []
    if pods.get("completionMode") != "Indexed":
        errors.append("completionMode is not Indexed, so no pod has a number")
    if pods.get("parallelism") != pods.get("completions"):
        errors.append("parallelism and completions differ")
    if env and env.get("JAXSYS_NUM_PROCESSES") != str(pods.get("parallelism")):
        errors.append("JAXSYS_NUM_PROCESSES is not the number of pods")
    if env and env.get("JAXSYS_COORDINATOR") not in expected:
        errors.append(f"JAXSYS_COORDINATOR is not pod 0 at an open port ({', '.join(expected)})")
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the JobSet manifest.")
    parser.add_argument("manifest", nargs="?", type=Path, default=HERE / "jobset.yaml")
    parser.add_argument("--crd", type=Path, help="the full custom resource definition")
    parser.add_argument("--smoke", action="store_true", help="the same; it is small already")
    given = parser.parse_args()
    manifest = yaml.safe_load(given.manifest.read_text())
    schema = json.loads((HERE / "jobset.schema.json").read_text())
    errors = schema_errors(manifest, schema)
    if given.crd is not None:
        versions = yaml.safe_load(given.crd.read_text())["spec"]["versions"]
        full = next(v for v in versions if v["name"] == "v1alpha2")["schema"]["openAPIV3Schema"]
        errors += [f"full definition: {line}" for line in schema_errors(manifest, full)]
    errors = errors or agreement_errors(manifest)
    for line in errors:
        print(f"{given.manifest.name}: {line}", file=sys.stderr)
    if not errors:
        against = "and the full definition" if given.crd else "(our part of the definition)"
        print(f"{given.manifest.name}: valid JobSet v1alpha2 {against}, names and counts agree")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
