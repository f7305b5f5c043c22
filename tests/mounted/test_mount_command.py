"""cloudfs mount and umount as commands: foreground, daemon, signals, mount points of every kind, stale mounts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import COMMAND, cloudfs, environment, on_terminal, sentence, unprivileged
from mounting import is_mounted, mounted, require_fuse, require_unmounting_helper, take_away
from support import REFUSED_WRITE, require, require_abort
from targets import running_target

LIMIT = 60.0


def wait_until(condition: Callable[[], object], what: str, limit: float = 15.0) -> None:
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, f"after {limit} s: not {what}"
        time.sleep(0.02)


@pytest.fixture
def point(tmp_path) -> Iterator[Path]:
    """A directory to mount on; whatever stands there is taken away in the end, and after a minute anyhow."""
    require_fuse()
    folder = tmp_path / "mount point"
    folder.mkdir()

    timer = threading.Timer(LIMIT, take_away, [folder])
    timer.start()
    yield folder
    timer.cancel()
    take_away(folder)
    assert not is_mounted(folder)


@contextlib.contextmanager
def daemon(point: Path, *words: str) -> Iterator[int]:
    """A daemon's PID; it is told to end at the end."""
    done = cloudfs("mount", "--daemon", "--json", *words, str(point))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    try:
        yield record["pid"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(record["pid"], signal.SIGTERM)
        wait_until(lambda: not runs(record["pid"]), "ended")


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(1 << 20))
    return path


def mount_options(point: Path) -> str:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if line.split()[4] == str(point).replace(" ", "\\040"))


# -- in the foreground -------------------------------------------------------------------------------


def test_a_mount_in_the_foreground_serves_and_ends_with_sigterm():
    with mounted() as mount:
        assert {"README", "connector", "os", "plugins"} <= set(os.listdir(mount.folder))
        assert mount.errors() == ""


def test_ctrl_c_unmounts_and_is_130(point):
    with on_terminal(["mount", str(point)], columns=200) as terminal:
        terminal.wait_for(b"Ctrl-C unmounts")
        assert os.listdir(point)
        terminal.keys(b"\3")
        assert terminal.finish() == 130
        assert b"Traceback" not in terminal.shown
    assert not is_mounted(point)


def test_a_mount_in_the_foreground_ends_when_it_is_unmounted(point):
    with on_terminal(["mount", str(point)]) as terminal:
        terminal.wait_for(b"\x1b[K")
        assert cloudfs("umount", str(point)).returncode == 0
        assert terminal.finish() == 0
    assert not is_mounted(point)


def test_the_status_line_counts_what_is_read(point, image):
    with on_terminal(["mount", str(image), str(point)], columns=200) as terminal:
        first = terminal.wait_for(b"0 reads, 0 B; Ctrl-C unmounts").decode()
        assert f"raw:{image} is mounted at {point}, read-only" in first
        assert (point / "connector/raw/phys_mem").read_bytes() == image.read_bytes()
        shown = terminal.wait_for(b"1.0 MiB").decode()
        last = shown.split("\r\x1b[K")[-1]
        assert int(re.search(r"(\d+) reads, 1.0 MiB", last)[1]) > 0
        assert "\n" not in last, "it is one line that is drawn again"
        terminal.keys(b"\3")
        assert terminal.finish() == 130


def test_the_status_line_is_no_wider_than_the_terminal(point):
    with on_terminal(["mount", str(point)], columns=20) as terminal:
        line = terminal.wait_for(b"\xe2\x80\xa6").decode().split("\r\x1b[K")[1]
        assert len(line) < 20
        terminal.keys(b"\3")
        terminal.finish()


def test_the_log_stands_above_the_status_line(point):
    with on_terminal(["mount", "-v", str(point)]) as terminal:
        terminal.wait_for(b"Ctrl-C unmounts")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.finish()
        shown = bytes(terminal.shown).decode()
    assert re.search(r"\r\x1b\[Kcloudfs: INFO: SIGTERM: unmounting\r\n", shown)


# -- as a daemon -------------------------------------------------------------------------------------


def test_a_daemon_stands_when_the_command_returns_and_holds_no_pipe(point):
    # `capture_output` waits until everybody has closed both pipes: the daemon, and the helper of FUSE too.
    done = cloudfs("mount", "--daemon", str(point), limit=30)
    try:
        assert os.listdir(point)
        assert done.returncode == 0
        assert done.stdout.decode() == f"this machine is mounted at {point}, read-only; `cloudfs umount` ends it\n"
        assert done.stderr == b""
    finally:
        assert cloudfs("umount", str(point)).returncode == 0
    assert not is_mounted(point)


def test_a_mount_with_an_overlay_does_not_claim_that_all_of_it_is_read_only(point, image):
    done = cloudfs("mount", "--daemon", "-c", f"raw:{image}:overlay=cow", str(point), limit=30)
    try:
        assert b"read-only but for what its overlay takes; " in done.stdout
    finally:
        assert cloudfs("umount", str(point)).returncode == 0


def test_a_daemon_is_in_a_session_of_its_own_and_ends_with_its_mount(point):
    with daemon(point) as pid:
        assert os.getsid(pid) == pid
        assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
        assert cloudfs("umount", str(point)).returncode == 0
        wait_until(lambda: not runs(pid), "ended")


def test_sigterm_ends_a_daemon_and_its_mount(point):
    with daemon(point) as pid:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not runs(pid), "ended")
        assert not is_mounted(point)


@pytest.mark.parametrize("closed", [">&-", ">/dev/full", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_daemon_stands_and_the_exit_code_says_so_whatever_cannot_be_printed(point, image, closed):
    command = f'exec "$@" {closed}'
    words = ["sh", "-c", command, "sh", *COMMAND, "mount", "--daemon", str(image), str(point)]
    done = subprocess.run(words, stderr=subprocess.PIPE, timeout=LIMIT, check=False, env=environment())
    try:
        assert done.returncode == 0
        if closed.startswith(">"):
            assert b"it is mounted, but standard output cannot be written" in done.stderr
        assert (point / "connector/raw/phys_mem").read_bytes() == image.read_bytes()
    finally:
        take_away(point)


def test_a_daemon_writes_its_log(point, tmp_path):
    log = tmp_path / "log"
    with daemon(point, "-v", "--log-file", str(log)):
        pass
    assert "SIGTERM: unmounting" in log.read_text()
    assert f"this machine is mounted at {point}" in log.read_text()


def test_a_relative_mount_point_is_meant_from_here(point, tmp_path):
    done = subprocess.run(
        [*COMMAND, "mount", "--daemon", point.name], cwd=tmp_path, capture_output=True, timeout=30, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert is_mounted(point)
    subprocess.run([*COMMAND, "umount", point.name], cwd=tmp_path, timeout=30, check=True, env=environment())
    assert not is_mounted(point)


# -- what is mounted ---------------------------------------------------------------------------------


def test_an_image_in_which_no_os_is_recognised_is_mounted_with_its_connector(point, image):
    done = cloudfs("mount", "--daemon", "--json", str(image), str(point))
    try:
        assert done.returncode == 0
        assert json.loads(done.stdout)["target"] == f"raw:{image}"
        assert "its connector is mounted alone" in done.stderr.decode()
        assert (point / "connector/raw/phys_mem").read_bytes() == image.read_bytes()
        assert not [name for name in os.listdir(point / "os") if name != "new"]
    finally:
        cloudfs("umount", str(point))


@pytest.mark.parametrize("words", [[], ["--os", "native"], ["-o", "native"], ["native"]])
def test_this_machine_is_named_in_every_way(point, words):
    with daemon(point, *words), running_target() as target:
        link = Path(f"/proc/{target.pid}/exe")
        assert os.readlink(point / "os" / "processes" / str(target.pid) / "exe") == os.readlink(link)


@pytest.mark.parametrize(
    ("words", "mode"), [([], 0o400), (["-o", "ro"], 0o400), (["--writable"], 0o600), (["-o", "rw"], 0o600)]
)
def test_only_writable_makes_memory_writable(point, image, words, mode):
    with daemon(point, *words, str(image)):
        memory = point / "connector/raw/phys_mem"
        assert memory.stat().st_mode & 0o777 == mode
        if mode == 0o600:
            with open(memory, "r+b", buffering=0) as file:
                file.write(b"changed")
            assert image.read_bytes()[:7] == b"changed"
        else:
            with pytest.raises(OSError, match=REFUSED_WRITE):
                os.open(memory, os.O_RDWR)


def may_allow_other() -> bool:
    """Whether the FUSE helper lets this user do that (fuse.conf(5))."""
    if os.geteuid() == 0:
        return True
    with contextlib.suppress(OSError):
        return "user_allow_other" in Path("/etc/fuse.conf").read_text().splitlines()
    return False


def test_others_are_let_in_where_this_user_may_do_that_and_else_it_says_what_allows_it(point, image):
    done = cloudfs("mount", "--daemon", "--allow-other", str(image), str(point))
    if not may_allow_other():
        assert done.returncode == 1
        assert b"user_allow_other" in done.stderr
        assert not is_mounted(point)
        return
    try:
        assert done.returncode == 0, done.stderr
        escaped = str(point).replace(" ", "\\040")
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        assert any(f" {escaped} " in line and "allow_other" in line for line in lines)
    finally:
        cloudfs("umount", str(point))


def test_mount_options_are_those_that_fuse_users_know(point, image):
    require(may_allow_other(), "the helper lets this user not mount with allow_other")
    with daemon(point, "-o", "allow_other,uid=12,gid=34,fsname=my image,noatime,nodev", str(image)):
        line = mount_options(point)
        assert "allow_other" in line
        assert "my\\040image" in line
        assert "noatime" in line
        state = (point / "connector/raw").stat()
        assert (state.st_uid, state.st_gid) == (12, 34)


def test_without_allow_other_nobody_else_gets_in(point):
    require(os.geteuid() == 0, "only root can become another user")
    with daemon(point):
        code = "import os, sys; os.setuid(65534); os.listdir(sys.argv[1])"
        os.chmod(point.parent, 0o755)
        done = subprocess.run([sys.executable, "-c", code, str(point)], capture_output=True, timeout=30, check=False)
        assert b"PermissionError" in done.stderr


# -- mount points ------------------------------------------------------------------------------------


def refused(*words: str) -> str:
    """What is said to `cloudfs mount WORDS`, as a daemon and in the foreground alike."""
    told = []
    for mode in ([], ["--daemon"]):
        done = cloudfs("mount", *mode, *words)
        assert done.returncode == 1
        told.append(sentence(done))
    assert told[0] == told[1]
    return told[0]


def test_a_mount_point_that_does_not_exist(point):
    assert "does not exist; make it with `mkdir" in refused(str(point / "nosuch"))


def test_a_mount_point_that_is_a_file(point, image):
    assert "is not a directory" in refused(str(image))


def test_a_mount_point_that_is_not_empty_unless_that_is_wanted(point):
    (point / "something").touch()
    assert "it is not empty" in refused(str(point))
    with daemon(point, "--nonempty"):
        assert "README" in os.listdir(point)
    with daemon(point, "-o", "nonempty"):
        assert "README" in os.listdir(point)
    assert os.listdir(point) == ["something"]


def test_a_mount_point_that_is_in_use_is_refused_and_the_mount_there_lives(point):
    with daemon(point):
        said = refused(str(point))
        assert "native is mounted there already; unmount it with" in said
        assert os.listdir(point)


def test_a_target_that_cannot_be_opened_mounts_nothing(point, tmp_path):
    assert "there is no file" in refused(str(tmp_path / "nosuch"), str(point))
    assert not is_mounted(point)


def test_an_image_that_is_not_mounted_is_not_said_to_be(point, image):
    assert "alone" not in refused(str(image), str(point / "nosuch"))


def test_without_dev_fuse_it_says_what_to_do(tmp_path):
    # /dev of this mount namespace alone is an empty directory.
    hide = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hide, "sh", *COMMAND, "mount", str(tmp_path)],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False, env=environment(),
    )  # fmt: skip
    require(b"unshare" not in done.stderr and b"mount:" not in done.stderr[:6], "no mount namespace can be made here")
    assert done.returncode == 1
    assert "there is no /dev/fuse; load the kernel's module with `modprobe fuse`" in sentence(done)


def test_another_user_mounts_or_is_told_why_not(tmp_path):
    folder = Path("/tmp") / f"cloudfs-nobody-{os.getpid()}"
    folder.mkdir()
    try:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        done = unprivileged("mount", "--daemon", str(folder), limit=30)
        if done.returncode == 0:
            assert is_mounted(folder)
            assert unprivileged("umount", str(folder), limit=30).returncode == 0
        else:
            assert done.returncode == 1
            assert "nothing can be mounted" in sentence(done)
        assert not is_mounted(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, timeout=30, check=False)
        folder.rmdir()


# -- unmounting --------------------------------------------------------------------------------------


def close_anyhow(descriptor: int) -> None:
    """close(2) of a file of a dead mount gives ENOTCONN, and closes it."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def test_a_mount_point_is_shown_without_dots(point, image):
    done = cloudfs("mount", "--daemon", "--json", str(image), f"{point}/./../{point.name}//")
    try:
        assert json.loads(done.stdout)["mountpoint"] == str(point)
    finally:
        done = cloudfs("umount", "--json", f"{point.parent}/./{point.name}/")
        assert json.loads(done.stdout)["mountpoint"] == str(point)


def test_who_stands_in_a_mount_keeps_it_busy_but_umount_itself_does_not(point, image):
    with daemon(point, str(image)):
        shell = ["sh", "-c", '"$@"; exit $?', "sh", *COMMAND, "umount", "."]
        done = subprocess.run(shell, cwd=point, capture_output=True, timeout=30, check=False, env=environment())
        assert done.returncode == 1
        assert re.search(r"is busy \(used by [0-9]+ \(sh\)\): .* cd out of it first", sentence(done))
        alone = subprocess.run([*COMMAND, "umount", "."], cwd=point, timeout=30, check=False, env=environment())
        assert alone.returncode == 0
        assert not is_mounted(point)


def test_a_mount_with_an_open_file_is_busy_and_force_ends_it(point, image):
    require_abort()
    with daemon(point, f"raw:{image}:live=yes"):  # else the kernel has its bytes, whoever serves them
        descriptor = os.open(point / "connector/raw/phys_mem", os.O_RDONLY)
        done = cloudfs("umount", str(point))
        assert done.returncode == 1
        assert f"is busy (used by {os.getpid()} (" in sentence(done)
        assert os.read(descriptor, 16) == image.read_bytes()[:16]
        done = cloudfs("umount", "--force", "--json", str(point))
        assert json.loads(done.stdout) == {"mountpoint": str(point), "unmounted": True}
        assert not is_mounted(point)
        with pytest.raises(OSError, match="not connected"):
            os.read(descriptor, 16)
        close_anyhow(descriptor)


@pytest.mark.parametrize("held", [False, True])
def test_the_mount_of_a_daemon_that_was_killed_is_cleared(point, image, held):
    with daemon(point, "-o", "noauto_unmount", str(image)) as pid, contextlib.ExitStack() as stack:
        if held:
            stack.callback(close_anyhow, os.open(point / "connector/raw/phys_mem", os.O_RDONLY))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not runs(pid), "ended")
        assert is_mounted(point), "the kernel keeps it"
        done = cloudfs("umount", str(point))
        assert (done.returncode, done.stderr) == (0, b"")
        assert not is_mounted(point)


def test_over_the_mount_of_a_daemon_that_was_killed_one_can_mount_again(point, image):
    with daemon(point, "-o", "noauto_unmount", str(image)) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not runs(pid), "ended")
        done = cloudfs("mount", "--daemon", str(point))
        try:
            assert done.returncode == 0
            assert done.stderr.decode().splitlines() == [
                f"cloudfs: WARNING: a mount of raw:{image} was cleared away from {point}: its daemon is gone"
            ]
            assert "native" in os.listdir(point / "os")
        finally:
            assert cloudfs("umount", str(point)).returncode == 0
        assert not is_mounted(point)


def test_by_default_the_mount_of_a_killed_daemon_goes_by_itself(point, image):
    require_unmounting_helper()
    with daemon(point, str(image)) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_mounted(point), "unmounted")


def test_what_is_no_mount_of_ours_is_left_alone(point):
    done = cloudfs("umount", "/proc")
    assert done.returncode == 2
    assert "it is a proc mount, not one of cloudfs" in sentence(done)
    done = cloudfs("umount", str(point))
    assert done.returncode == 1
    assert "nothing is mounted there" in sentence(done)
