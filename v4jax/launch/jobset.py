"""A JobSet for TPU slices on GKE: one job a slice, one pod a host.

JobSet starts all pods again if one fails. A pod that is evicted, or that has saved its state
because of a signal, does not count against the restarts. Kubernetes itself must not restart pods
then: it accepts a `podFailurePolicy` only with `restartPolicy: Never`.
"""

from typing import Any

from v4jax.launch import documents
from v4jax.launch.job import GRACE, SAVED, Job
from v4jax.launch.topology import TPUS

_RECIPE = "/etc/v4jax/recipe.toml"
_JOB = "slice"  # the replicated job
_WAIT = 1800  # seconds for the nodes of all slices to come, and to fetch the image
_FAILURE = "PodFailurePolicy"
_JOB_INDEX = "metadata.annotations['jobset.sigs.k8s.io/job-index']"


def text(job: Job) -> str:
    """The manifest: the recipe as a ConfigMap, and the JobSet."""
    metadata = {"name": job.name} | ({"namespace": job.namespace} if job.namespace else {})
    recipe = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"recipe.toml": job.text},
    }
    return documents.dump(recipe, _jobset(job, metadata))


def _jobset(job: Job, metadata: dict[str, Any]) -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    # One slice in each node pool; nodes of a single host are slices by themselves.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            **metadata,
            **({"labels": labels} if labels else {}),
            **({"annotations": exclusive} if job.topology.hosts > 1 else {}),
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": [_FAILURE],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": _JOB, "replicas": job.slices, "template": _job(job)}],
        },
    }


def _job(job: Job) -> dict[str, Any]:
    hosts = job.topology.hosts
    rules = [
        {
            "action": "FailJob",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [SAVED]}},
    ]
    return {
        "spec": {
            "completionMode": "Indexed",
            "completions": hosts,
            "parallelism": hosts,
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": rules},
            "template": {"spec": _pod(job)},
        }
    }


def _pod(job: Job) -> dict[str, Any]:
    topology = job.topology
    mounts = [("recipe", _RECIPE.rpartition("/")[0], {"configMap": {"name": job.name}})]
    if job.local:
        # In the node's memory, so that a new pod there finds the states of the old one.
        ram = {"hostPath": {"path": f"/dev/shm/{job.name}", "type": "DirectoryOrCreate"}}
        mounts.append(("local", job.local, ram))
    for number, (claim, path) in enumerate(job.volumes.items()):
        source = {"persistentVolumeClaim": {"claimName": claim}}
        mounts.append((f"volume-{number}", path, source))
    chips = {"google.com/tpu": topology.chips_per_host}
    container = {
        "name": "train",
        "image": job.image,
        "command": job.command(_RECIPE, "--distributed", "--wait", str(_WAIT)),
        "env": _environment(job),
        "resources": {"requests": chips, "limits": dict(chips)},
        "volumeMounts": [{"name": name, "mountPath": path} for name, path, _ in mounts],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": TPUS[topology.kind].gke,
            "cloud.google.com/gke-tpu-topology": topology.extent,
        },
        "containers": [container],
        "volumes": [{"name": name} | source for name, _, source in mounts],
    }


def _environment(job: Job) -> list[dict[str, Any]]:
    """Where a pod is among all. Kubernetes adds its index, which begins anew in each slice."""
    values = {
        "JOBSET_REPLICAS": str(job.slices),
        "JOBSET_PODS": str(job.topology.hosts),
        # The first pod, in the headless service that JobSet names after itself.
        "JOBSET_COORDINATOR": f"{job.name}-{_JOB}-0-0.{job.name}",
    }
    index = {"name": "JOBSET_JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": _JOB_INDEX}}}
    return [index, *({"name": name, "value": value} for name, value in values.items())]
