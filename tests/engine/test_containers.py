"""Containers told by cgroup paths, as the engines write them."""

from __future__ import annotations

import pytest

from engine.containers import cgroup_paths, container_among, container_of, main_path

ONE, TWO = "0123456789abcdef" * 4, "fedcba9876543210" * 4


@pytest.mark.parametrize(
    "path",
    [
        f"/docker/{ONE}",
        f"/system.slice/docker-{ONE}.scope",
        f"/system.slice/docker-{ONE}.scope/init.scope",
        f"/machine.slice/libpod-{ONE}.scope/container",
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ONE}.scope",
        f"/kubepods/burstable/pod01234567-89ab-cdef-0123-456789abcdef/{ONE}",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0123.slice/cri-containerd-{ONE}.scope",
        f"/kubepods.slice/kubepods-pod0123.slice/crio-{ONE}.scope",
        f"/system.slice/nerdctl-{ONE}.scope",
        f"/ecs/0123/{ONE}",
        f"/docker/{TWO}/docker/{ONE}",
        f"/lxc/web/system.slice/docker-{ONE}.scope",
    ],
)
def test_the_identifier_of_a_container_is_told(path):
    assert container_of(path) == ONE


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/lxc/web", "web"),
        ("/lxc/web/init.scope", "web"),
        ("/lxc.payload.web/system.slice/cron.service", "web"),
        ("/lxc.payload/web", "web"),
        ("/machine.slice/systemd-nspawn@deb-12.service/payload", "deb-12"),
        ("/machine.slice/machine-deb\\x2d12.scope", "deb-12"),
        ("/garden/0123abcd-4567", "0123abcd-4567"),
    ],
)
def test_a_container_that_goes_by_a_name_is_told(path, name):
    assert container_of(path) == name


@pytest.mark.parametrize(
    "path",
    [
        "/", "", "/user.slice/user-1000.slice/session-1.scope", "/system.slice/docker.service", "/docker", "/lxc",
        f"/system.slice/docker-{ONE[:-1]}.scope", f"/machine.slice/libpod-conmon-{ONE}.scope",
        f"/crio-conmon-{ONE}.scope", "/kubepods/burstable/pod01234567", "/lxc.monitor.web", "/box",
    ],
)  # fmt: skip
def test_what_is_in_no_container_is_told_so(path):
    assert container_of(path) is None


HYBRID = f"""12:cpu,cpuacct:/
5:memory:/docker/{ONE}
1:name=systemd:/system.slice/docker.service
0::/
"""


def test_paths_of_a_process_come_unified_first_then_named():
    assert cgroup_paths(HYBRID) == ["/", "/system.slice/docker.service", f"/docker/{ONE}", "/"]
    assert cgroup_paths("0::/box (deleted)\n") == ["/box"]
    assert cgroup_paths("") == cgroup_paths("damaged\nx:y:/z\n") == []


def test_the_main_path_is_the_unified_one_unless_another_says_more():
    assert main_path(cgroup_paths(HYBRID)) == "/system.slice/docker.service"
    assert main_path(["/a", "/b/c"]) == "/a"
    assert main_path(["/", "/"]) == "/"
    assert main_path(["/", "/user"]) == "/user"
    assert main_path([]) is None


def test_any_of_the_paths_may_tell_the_container():
    assert container_among(cgroup_paths(HYBRID)) == ONE
    assert container_among(["/", "/box"]) is None
