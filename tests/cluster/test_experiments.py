"""The files under experiments/cluster: the manifest's check can fail, and the demo joins."""

import copy
import json
import sys
from pathlib import Path

import pytest
import yaml

from jaxsys.cluster import launch

HERE = Path(__file__).parents[2] / "experiments" / "cluster"


@pytest.fixture(scope="module")
def check(load_experiment):
    return load_experiment("cluster/check_jobset.py")


@pytest.fixture
def manifest():
    return yaml.safe_load((HERE / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def schema():
    return json.loads((HERE / "jobset.schema.json").read_text())


def test_the_manifest_is_valid(check, manifest, schema):
    check.jsonschema.Draft202012Validator.check_schema(schema)
    assert check.schema_errors(manifest, schema) == []
    assert check.agreement_errors(manifest) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["apiVersion"], "jobset.x-k8s.io/v1"),
        (["spec", "replicatedJobs"], []),
        (["spec", "netwerk"], {}),
        (["spec", "failurePolicy", "maxRestarts"], "three"),
        (["spec", "replicatedJobs", 0, "name"], "Workers"),
        (["spec", "replicatedJobs", 0, "template", "spec", "parallelism"], -1),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec"], {}),
    ],
)
def test_a_broken_manifest_is_refused(check, manifest, schema, path, value):
    broken = copy.deepcopy(manifest)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert check.schema_errors(broken, schema)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("parallelism: 4", "parallelism: 3", "differ"),
        ('value: "4"', 'value: "5"', "not the number of pods"),
        ("jaxsys-workers-0-0", "jaxsys-workers-0-1", "not pod 0"),
        ("containerPort: 4000", "containerPort: 4001", "not pod 0"),
        ("completionMode: Indexed", "completionMode: NonIndexed", "no pod has a number"),
    ],
)
def test_numbers_that_disagree_are_said(check, before, after, said):
    text = (HERE / "jobset.yaml").read_text()
    assert before in text
    errors = check.agreement_errors(yaml.safe_load(text.replace(before, after)))
    assert any(said in error for error in errors)


def test_the_demo_adds_up(environ):
    seen: list[str] = []
    demo = ["timeout", "-k", "1", "90", sys.executable, str(HERE / "join_demo.py")]
    report = launch(demo, 2, env=environ, on_line=lambda i, line: seen.append(line))
    assert report.exit_code == 0, seen
    assert sum(line.endswith("psum = 3") for line in seen) == 2
