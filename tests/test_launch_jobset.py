"""Manifests of JobSet: they fit its schema, and every pod has its place."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tests.launches import RECIPE, TPU_SLICES, Capsys, make, printed, write_recipe
from v4jax import cluster
from v4jax.launch import jobset
from v4jax.launch.topology import Topology


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """JobSet's schema and that of the pods in it, without fields that it does not have."""
    schema = JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    for name, definition in (("", schema), *schema["$defs"].items()):
        properties = definition.get("properties", {})
        if "one_of_schemas" in properties:
            # A quantity, which Kubernetes also takes as a number.
            schema["$defs"][name] = {"type": ["string", "number"]}
        elif properties:
            definition["additionalProperties"] = False
    return schema


def documents(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config, jobs = yaml.safe_load_all(text)
    return config, jobs


def pod(jobs: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobs["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


@given(where=st.sampled_from(TPU_SLICES), slices=st.integers(1, 4))
def test_each_pod_of_a_jobset_has_a_place_of_its_own(where: Topology, slices: int) -> None:
    _, jobs = documents(jobset.text(make(where, slices)))
    (replicated,) = jobs["spec"]["replicatedJobs"]
    spec, (container,) = replicated["template"]["spec"], pod(jobs)["containers"]
    assert spec["completions"] == spec["parallelism"] == where.hosts
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips * spec["completions"] == where.chips
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    places = [
        cluster.locate(variables | {"JOBSET_JOB_INDEX": str(i), "JOB_COMPLETION_INDEX": str(host)})
        for i in range(replicated["replicas"])
        for host in range(spec["completions"])
    ]
    known = [place for place in places if place is not None]
    assert [place.process for place in known] == list(range(slices * where.hosts))
    assert {place.slices for place in known} == {slices}
    assert {place.coordinator for place in known} == {"run-slice-0-0.run:8482"}


@pytest.mark.parametrize("where", ["v5p:4x4x8", "v6e:2x4", "v6e:16x16", "tpu7x:2x2x1"])
def test_manifests_fit_the_schema_of_jobset(
    where: str, schema: dict[str, Any], tmp_path: Path, capsys: Capsys
) -> None:
    options = [
        write_recipe(tmp_path),
        "--on",
        "gke",
        "--topology",
        where,
        "--image",
        "x",
        "--namespace",
        "ml",
    ]
    text = printed(capsys, *options, "--queue", "q", "--volume", "runs:/runs")
    config, jobs = documents(text)
    jsonschema.validate(jobs, schema, cls=jsonschema.Draft202012Validator)
    assert config["data"] == {"recipe.toml": RECIPE}
    assert jobs["metadata"]["name"] == "train-lora"
    assert jobs["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    chip, _, extent = where.partition(":")
    selector = {"v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
    assert pod(jobs)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": selector[chip],
        "cloud.google.com/gke-tpu-topology": extent,
    }
    # Kubernetes accepts a podFailurePolicy only for pods that it does not restart itself.
    assert pod(jobs)["restartPolicy"] == "Never"
    assert pod(jobs)["terminationGracePeriodSeconds"] >= 300
    mounts = {x["name"]: x["mountPath"] for x in pod(jobs)["containers"][0]["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod(jobs)["volumes"]}
    assert mounts == {"recipe": "/etc/v4jax", "local": "/local", "volume-0": "/runs"}
    # A node pool holds one slice, except of nodes that are slices by themselves.
    assert ("annotations" in jobs["metadata"]) == (where in ("v5p:4x4x8", "v6e:16x16"))


@pytest.mark.parametrize("field", ["completionMode", "restartPolicy", "image"])
def test_the_schema_finds_a_wrong_field(field: str, schema: dict[str, Any]) -> None:
    wrong = jobset.text(make("v5p:4x4x8")).replace(f"{field}:", f"{field}s:")
    _, jobs = documents(wrong)
    with pytest.raises(jsonschema.ValidationError, match=f"{field}s"):
        jsonschema.validate(jobs, schema, cls=jsonschema.Draft202012Validator)


@given(
    where=st.sampled_from(TPU_SLICES),
    slices=st.integers(1, 200),
    name=st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True),
)
def test_names_of_pods_fit_in_dns(where: Topology, slices: int, name: str) -> None:
    longest = f"{name}-slice-{slices - 1}-{where.hosts - 1}-abcde"
    if len(longest) <= 63 and not name.endswith("-"):
        assert make(where, slices, name=name).name == name
    else:
        with pytest.raises(ValueError, match="--name"):
            make(where, slices, name=name)
