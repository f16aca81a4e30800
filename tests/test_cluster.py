"""Clusters: every process has an index of its own, and the missing ones are named."""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies

from v4jax import cluster, rendezvous
from v4jax.cluster import Place
from v4jax.model import sharding
from v4jax.rendezvous import ClusterError, Ended, Peers

STALE = {"MEGASCALE_NUM_SLICES": "7", "MEGASCALE_SLICE_ID": "6", "MEGASCALE_PORT": "1"}


def gke(slices: int, hosts: int, index: int, host: int) -> dict[str, str]:
    """What GKE sets in a pod of a TPU slice."""
    names = ",".join(f"run-worker-{index}-{i}.run" for i in range(hosts))
    variables = {"TPU_WORKER_ID": str(host), "TPU_WORKER_HOSTNAMES": names}
    if slices == 1:
        return variables
    return variables | {
        "MEGASCALE_NUM_SLICES": str(slices),
        "MEGASCALE_SLICE_ID": str(index),
        "MEGASCALE_COORDINATOR_ADDRESS": "run-worker-0-0.run:8080",
    }


def jobset(slices: int, hosts: int, index: int, host: int) -> dict[str, str]:
    return STALE | {
        "JOB_COMPLETION_INDEX": str(host),
        "JOBSET_REPLICAS": str(slices),
        "JOBSET_JOB_INDEX": str(index),
        "JOBSET_PODS": str(hosts),
        "JOBSET_COORDINATOR": "run-worker-0-0.run",
    }


def jobset_on_gke(slices: int, hosts: int, index: int, host: int) -> dict[str, str]:
    return gke(slices, hosts, index, host) | {"JOB_COMPLETION_INDEX": str(host)}


def kubeflow(slices: int, hosts: int, index: int, host: int) -> dict[str, str]:
    """Kubeflow's index, which restarts in each slice, and a stale number of slices."""
    return jobset_on_gke(slices, hosts, index, host) | {
        "MEGASCALE_NUM_SLICES": "7",
        "JAX_PROCESS_ID": str(host),
        "JAX_NUM_PROCESSES": str(slices * hosts),
        "JAX_COORDINATOR_ADDRESS": "run-worker-0-0.run:6666",
    }


def ray(slices: int, hosts: int, index: int, host: int) -> dict[str, str]:
    return (
        gke(slices, hosts, index, host)
        | STALE
        | {
            "RANK": str(index * hosts + host),
            "WORLD_SIZE": str(slices * hosts),
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "4321",
        }
    )


def slurm(slices: int, hosts: int, index: int, host: int) -> dict[str, str]:
    return gke(slices, hosts, index, host) | {
        "SLURM_JOB_ID": "70001",
        "SLURM_PROCID": str(index * hosts + host),
        "SLURM_NTASKS": "999",
        "SLURM_STEP_NUM_TASKS": str(slices * hosts),
        "SLURM_STEP_NODELIST": "tpu[007-100,102],login",
    }


LAUNCHERS = (gke, jobset, jobset_on_gke, kubeflow, ray, slurm)
sizes = st.integers(1, 5)


@given(launcher=st.sampled_from(LAUNCHERS), slices=sizes, hosts=sizes)
def test_each_process_of_a_launcher_has_an_index_of_its_own(
    launcher: Callable[..., dict[str, str]], slices: int, hosts: int
) -> None:
    places = [
        cluster.locate(launcher(slices, hosts, index, host))
        for index in range(slices)
        for host in range(hosts)
    ]
    known = [place for place in places if place is not None]
    assert [place.process for place in known] == list(range(slices * hosts))
    assert {(place.processes, place.slices) for place in known} == {(slices * hosts, slices)}
    assert [place.slice for place in known] == [i for i in range(slices) for _ in range(hosts)]
    assert len({place.coordinator for place in known}) == 1
    for place in known:
        expected = {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(place.slice)}
        assert place.megascale().items() >= expected.items() or slices == 1
        assert bool(place.megascale()) == (slices > 1)


def test_coordinators() -> None:
    coordinator = lambda environment: vars(cluster.locate(environment) or object)["coordinator"]
    assert coordinator(jobset(2, 2, 1, 0)) == "run-worker-0-0.run:8482"
    assert coordinator(kubeflow(2, 2, 1, 0)) == "run-worker-0-0.run:6666"
    assert coordinator(gke(2, 2, 1, 0)) == "run-worker-0-0.run:8482"
    assert coordinator(gke(1, 2, 0, 1)) == "run-worker-0-0.run:8482"
    assert coordinator(ray(2, 2, 1, 0)) == "10.0.0.1:4321"
    assert coordinator(slurm(2, 2, 1, 0)) == f"tpu007:{61440 + 70001 % 4096}"
    assert coordinator(ray(1, 2, 0, 1) | {"JAX_COORDINATOR_PORT": "9"}) == "10.0.0.1:9"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "start it with srun"),
        (ray(1, 2, 0, 1) | {"TPU_WORKER_ID": "0"}, "host 1 of its slice, TPU_WORKER_ID.* host 0"),
        (ray(1, 3, 0, 1) | {"WORLD_SIZE": "4"}, "4 processes, TPU_WORKER_HOSTNAMES.* 3 hosts"),
        (ray(1, 2, 0, 1) | {"RANK": "2"}, "TPU_WORKER_ID|process 2 of 2"),
        (ray(1, 2, 0, 1) | {"RANK": "one"}, "RANK is 'one'; it must be a number"),
        (jobset(2, 2, 1, 0) | {"JOBSET_JOB_INDEX": "2"}, "process 4 of 4"),
        (jobset(2, 2, 1, 0) | {"JOB_COMPLETION_INDEX": "2"}, "pod 2 of 2"),
        (jobset(2, 2, 1, 0) | {"JAX_NUM_PROCESSES": "3"}, "2 slices; in all there are 3 proc"),
        (jobset(2, 2, 1, 0) | {"TPU_WORKER_HOSTNAMES": "a,b,c"}, "3 hosts in a slice"),
        (jobset(2, 2, 1, 0) | {"JOBSET_REPLICAS": "0"}, "process 2 of 0"),
        (jobset(2, 2, 1, 0) | {"JOBSET_PODS": "0"}, "set JOBSET_PODS"),
        ({"JOB_COMPLETION_INDEX": "0"}, "set JOBSET_PODS"),
        ({"JOB_COMPLETION_INDEX": "0", "JOBSET_PODS": "1"}, "set JOBSET_COORDINATOR"),
        (
            slurm(1, 2, 0, 1)
            | ray(1, 2, 0, 1)
            | {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"},
            r"contradict each other \(Slurm: process 3 of 4; Ray",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "1"}, "JAX_COORDINATOR_ADDRESS"),
        (gke(2, 2, 1, 0) | {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID is 2, of 2 hosts"),
    ],
)
def test_contradictions_are_errors_with_a_remedy(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        cluster.locate(environment)


def test_no_launcher() -> None:
    assert cluster.locate({"HOME": "/root"}) is None
    place = cluster.at("host:1", 4, 3, gke(2, 2, 1, 1))
    assert (place.slice, place.slices) == (1, 2)
    for processes, process in ((4, 4), (0, 0), (-1, 0), (2, -1)):
        with pytest.raises(ClusterError, match=f"process {process} of {processes}"):
            cluster.at("host:1", processes, process, {"MEGASCALE_NUM_SLICES": "0"})
    assert cluster.locate({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    with pytest.raises(ClusterError, match="HOST:PORT"):
        cluster.at("host", 4, 0, {})


def test_joining_sets_megascale_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    initialized: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: initialized.append(args))
    monkeypatch.setattr(rendezvous, "meet", lambda *_, **__: Peers(0, {}))
    for name, value in (STALE | {"MEGASCALE_COORDINATOR_ADDRESS": "gone:1"}).items():
        monkeypatch.setenv(name, value)
    place = cluster.locate(jobset(2, 2, 1, 0))
    assert place is not None
    cluster.join(place)
    megascale = {k: v for k, v in os.environ.items() if k.startswith("MEGASCALE")}
    assert megascale == place.megascale()
    cluster.join(Place("test", 0, 1, "localhost:1"))
    assert not [name for name in os.environ if name.startswith("MEGASCALE")]
    assert initialized == [("run-worker-0-0.run:8482", 4, 2), ("localhost:1", 1, 0)]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number = free.getsockname()[1]
    return number


def meet(port: int, numbers: list[int], processes: int, **options: Any) -> list[Any]:
    """What `meet` returns or raises in several processes at once, here threads."""
    results: list[Any] = [None] * len(numbers)

    def run(index: int) -> None:
        try:
            where = f"localhost:{port}"
            results[index] = rendezvous.meet(where, numbers[index], processes, **options)
        except ClusterError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(numbers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_missing_processes_are_named_everywhere(port: int) -> None:
    hosts = ["a", "b", "c", "d"]
    answers = meet(port, [0, 2], 4, timeout=1.0, hosts=hosts)
    for answer in answers:
        assert "After 1 s 2 of 4 processes are missing: 1 (b), 3 (d)." in answer
        assert f"Those that have come: 0 ({socket.gethostname()}), 2" in answer


def test_without_the_first_process_the_others_say_so(port: int) -> None:
    (answer,) = meet(port, [1], 2, timeout=0.2)
    assert f"Process 0 at localhost:{port} has not answered" in answer


@pytest.mark.parametrize(
    ("numbers", "message"), [([0, 1, 1], "are both process 1 of 3"), ([0, 1, 5], "does not belong")]
)
def test_an_index_is_given_once(port: int, numbers: list[int], message: str) -> None:
    answers = meet(port, numbers, 3, timeout=3.0)
    assert message in answers[0]
    assert sum(message in answer for answer in answers) >= 2


def test_strangers_and_restarted_processes_are_no_obstacle(port: int) -> None:
    results: list[Any] = []
    first = threading.Thread(target=lambda: results.extend(meet(port, [0], 3, timeout=20.0)))
    first.start()
    connect = lambda: rendezvous._connect("localhost", port, time.monotonic() + 5, 5.0)
    stranger = connect()
    stranger.send({"unknown": 1})
    dies = connect()
    dies.send({"process": 1, "processes": 3, "host": "old"})
    time.sleep(0.1)
    dies.close()
    results += meet(port, [1, 2], 3, timeout=20.0)
    first.join()
    assert all(isinstance(peers, Peers) for peers in results)
    assert len(results) == 3
    stranger.close()
    close(results)


@pytest.mark.parametrize("dies", [0, 1])
def test_the_end_of_one_process_is_noticed_by_all(port: int, dies: int) -> None:
    group = meet(port, [0, 1, 2], 3, timeout=20.0)
    noticed: dict[int, Ended] = {}
    known = threading.Semaphore(0)

    def notice(process: int) -> Callable[[Ended], None]:
        return lambda ended: (noticed.__setitem__(process, ended), known.release())[0]

    for process, peers in enumerate(group):
        if process != dies:
            peers.watch(notice(process))
    close([group[dies]])
    assert all(known.acquire(timeout=10.0) for _ in range(2))
    assert noticed.keys() == {0, 1, 2} - {dies}
    assert {ended.process for ended in noticed.values()} == {dies}
    close(group)


def test_stalls_are_passed_on_and_proper_ends_are_not(port: int) -> None:
    group = meet(port, [0, 1, 2], 3, timeout=20.0)
    stalled = threading.Event()
    ends: list[Ended] = []
    for peers in (group[0], group[2]):
        peers.watch(lambda ended: (ends.append(ended), stalled.set())[0])
    group[2].leave()
    group[1].stalled()
    assert stalled.wait(10.0)
    time.sleep(0.1)
    assert {(ended.process, ended.stalled) for ended in ends} == {(1, True)}
    close(group)


def close(group: list[Peers]) -> None:
    for peers in group:
        for connection in peers._connections.values():
            connection.close()


def test_only_the_data_axis_spans_slices() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2)
    mesh = sharding.make_mesh(data=4, expert=2, tensor=2, devices=topology.devices)
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="data must be a multiple of 2, not 1"):
        sharding.make_mesh(expert=16, devices=topology.devices)
