"""Facts of the machine: read from files that others have written, and none that can't be read raises."""

import json
import time

import pytest

from kvtransport.cli import machine
from kvtransport.cli.copying import copy_speed


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_of_this_machine():
    found = machine.facts()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["kvtransport"]
    assert found["cores"]["usable"]
    assert found["memory"]["total_nbytes"] > found["memory"]["available_nbytes"] > 0
    assert found["limits"]["open_files"]
    assert len(found["place"]["boot_id"]) == 36
    assert found["place"]["net_namespace"]


def test_where_nothing_can_be_read(tmp_path):
    found = machine.facts(tmp_path)
    assert found["cores"]["cgroup_quota"] is None
    assert found["memory"] == dict.fromkeys(found["memory"])
    assert found["network"]["congestion_control"] is None
    assert found["network"]["congestion_controls"] == []
    assert found["devices"] == {"nvidia_driver": None, "rdma": []}


def test_the_least_limit_of_nested_groups(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/worker\n",
            "sys/fs/cgroup/pod/worker/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/worker/memory.max": "1073741824\n",
            "sys/fs/cgroup/pod/memory.max": "2147483648\n",
        },
    )
    assert machine.cpu_quota(tmp_path) == 1.5
    assert machine.memory_limit(tmp_path) == 1 << 30


def test_groups_of_version_1(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.cpu_quota(tmp_path) == 0.5
    assert machine.memory_limit(tmp_path) == machine.UNLIMITED


def test_groups_without_a_limit(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/memory.max": "max\n",
        },
    )
    assert machine.cpu_quota(tmp_path) == machine.UNLIMITED
    assert machine.memory_limit(tmp_path) == machine.UNLIMITED


@pytest.mark.parametrize(
    ("files", "environ", "sign"),
    [
        ({".dockerenv": ""}, {}, "/.dockerenv"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "KUBERNETES_SERVICE_HOST"),
        ({"proc/1/cgroup": "0::/kubepods/pod1\n"}, {}, "cgroup kubepods"),
        (
            {"proc/self/mountinfo": "1 2 0:3 / / rw,relatime - overlay overlay rw\n"},
            {},
            "the root is an overlay",
        ),
    ],
)
def test_signs_of_a_container(tmp_path, files, environ, sign):
    assert machine.container_signs(tmp_path, {}) == []
    write(tmp_path, files)
    assert machine.container_signs(tmp_path, environ) == [sign]


def test_devices(tmp_path):
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\nGCC version: gcc 12\n"
    write(
        tmp_path, {"proc/driver/nvidia/version": version, "sys/class/infiniband/mlx5_0/node_type": "1: CA\n"}
    )
    found = machine.facts(tmp_path)["devices"]
    assert found == {"nvidia_driver": "550.54.14", "rdma": ["mlx5_0"]}


def test_copying_is_measured_in_a_bounded_time():
    began = time.monotonic()
    found = copy_speed(4 << 20)
    assert found["nbytes"] == 4 << 20
    assert "1" in found["gb_per_s"]
    assert all(rate > 0 for rate in found["gb_per_s"].values())
    assert time.monotonic() - began < 20


def test_copying_without_room_is_not_measured():
    assert copy_speed(1 << 60) == {"nbytes": 1 << 60, "gb_per_s": {}}
