"""What the [slurm] section accepts."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.core.config import load_config
from millrace.core.errors import UserError
from millrace.slurm.config import SlurmConfig


@pytest.mark.parametrize("time", ["", "90", "90:00", "2:00:00", "100:59:59", "1-12", "1-12:30", "1-12:30:59", "0:5"])
def test_time_limits_of_slurm(time: str) -> None:
    assert SlurmConfig(time=time).time == time


@pytest.mark.parametrize("time", ["2h", "30 min", "1:60", "1:00:75", "-5", "1-", "1-1:1:1:1", "1:2:3:4", " 5"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(ValueError, match=r"time = .*is not a time limit.*'2:00:00'"):
        SlurmConfig(time=time)


@pytest.mark.parametrize(
    ("given", "processes", "cpus"),
    [
        ({}, 1, 1),
        ({"gpus_per_node": 8}, 8, 8),
        ({"gpus_per_node": 8, "processes_per_node": 4}, 4, 4),
        ({"processes_per_node": 2, "cpus_per_task": 7}, 2, 7),
    ],
)
def test_processes_and_cores_of_a_node(given: dict[str, Any], processes: int, cpus: int) -> None:
    config = SlurmConfig(**given)
    assert (config.processes, config.cpus) == (processes, cpus)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": 0}, r"nodes = 0 is too small.*from 1 up"),
        ({"gpus_per_node": -1}, r"gpus_per_node = -1 is too small.*from 0 up"),
        (
            {"gpus_per_node": 2, "processes_per_node": 4},
            r"processes_per_node = 4 is more than gpus_per_node = 2",
        ),
        ({"processes_per_node": 4, "cpus_per_task": 2}, r"cpus_per_task = 2 is less than the 4 processes"),
        ({"partition": "a\nb"}, r"partition = 'a\\nb' holds a line break"),
        ({"job_name": "a\rb"}, r"job_name = .* holds a line break"),
        ({"setup": ["ok", "a\nb"]}, r"setup\[1\] = .* holds a line break"),
        ({"environment": {"A": "1\n2"}}, r"environment.A = .* holds a line break"),
        ({"environment": {"A": 1}}, r"environment.A = 1: expected a string, not int; put it in quotes"),
        ({"environment": {"A-B": "1"}}, r"environment: 'A-B' is not a variable's name"),
        ({"extra": ["exclusive"]}, r"extra: 'exclusive' is not one sbatch option; write"),
        ({"extra": ["--mem 4G"]}, r"extra: '--mem 4G' is not one sbatch option"),
        ({"extra": ["--nodes=3"]}, r"extra: '--nodes=3' has a key of its own; set nodes instead"),
        ({"extra": ["-t=3"]}, r"extra: '-t=3' has a key of its own; set time instead"),
        ({"extra": ["--array=1-3"]}, r"extra: '--array=1-3' would start several jobs"),
        ({"container_mounts": ["/a:/a"]}, r"container_mounts is set and container is not"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlurmConfig(**given)


def test_a_file_is_read_and_its_mistakes_say_where(tmp_path: Any) -> None:
    path = tmp_path / "slurm.toml"
    path.write_text('nodes = 2\nsetup = ["module load x"]\n[environment]\nA = "1"\n')
    config = load_config(SlurmConfig, path, ["gpus_per_node=4"])
    assert (config.nodes, config.processes, config.setup) == (2, 4, ["module load x"])
    assert config.environment == {"A": "1"}
    with pytest.raises(UserError, match=r"unknown key 'partion' in override.*did you mean 'partition'"):
        load_config(SlurmConfig, path, ["partion=gpu"])
    with pytest.raises(UserError, match=r"slurm.toml: nodes = 0 is too small"):
        load_config(SlurmConfig, path, ["nodes=0"])
