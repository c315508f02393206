"""Where a task stands: names of nodes, ports, and what SLURM and submitit say in the environment."""

from __future__ import annotations

import pytest

from sft_dist.errors import PreflightError
from sft_dist.jobs.place import PLACE, expand_nodes, find_place, handed_place, port

SPEC = {"run": "/r/x", "folder": "/r/x/slurm", "parts": ["train"], "max_requeues": 3}
ON_SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "n[3-4]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,5]", ["n1", "n2", "n3", "n5"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("a1,b[2,4]-ib,c", ["a1", "b2-ib", "b4-ib", "c"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert list(expand_nodes(text)) == names


def test_no_nodes_is_an_error() -> None:
    with pytest.raises(PreflightError):
        expand_nodes("")


def test_ports_change_with_each_restart_and_stay_below_the_ephemeral_ones() -> None:
    ports = [port(str(job), restart) for job in range(1, 300) for restart in range(3)]
    assert min(ports) >= 20000
    assert max(ports) < 32768
    assert port("7", 0) != port("7", 1)
    assert port("7", 1) == port("7", 1)


def test_a_task_of_slurm() -> None:
    place = find_place(SPEC, ON_SLURM)
    assert (place.key, place.node, place.task, place.tasks_per_node, place.local_task) == ("41.0", 1, 3, 2, 1)
    assert place.address == "n3"
    assert place.marker == "/r/x/slurm/requeue.41.0"
    assert place.parts == ("train",)
    assert find_place({**SPEC, "master_addr": "{host}i"}, ON_SLURM).address == "n3i"
    assert find_place(SPEC, {**ON_SLURM, "SLURM_RESTART_COUNT": "2"}).key == "41.2"


def test_a_task_of_an_array_goes_by_the_name_that_is_its_own() -> None:
    """The number of the last one is that of the whole array; its files and the marker are named as the script has it."""
    place = find_place(SPEC, {**ON_SLURM, "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"})
    assert (place.job, place.key, place.marker) == ("41_2", "41_2.0", "/r/x/slurm/requeue.41.0")


def test_a_task_of_submitits_local_executor_is_alone_even_inside_a_job() -> None:
    env = {**ON_SLURM, "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "99", "SUBMITIT_LOCAL_NTASKS": "1"}
    place = find_place(SPEC, env)
    assert (place.job, place.nodes, place.address, place.requeues) == ("99", ("localhost",), "127.0.0.1", 0)


def test_a_place_is_handed_on_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    place = find_place(SPEC, ON_SLURM)
    assert handed_place() is None
    monkeypatch.setenv(PLACE, place.to_text())
    assert handed_place() == place
