"""cloudfs ps, info, maps, modules, targets, plugins on this machine, against ps(1), /proc and readelf(1)."""

from __future__ import annotations

import datetime
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import cloudfs, in_process, on_terminal, sentence, unprivileged
from hand_made_tables import DTB, image
from support import require
from targets import running_target

from cloudfs.commands._output import Output, clip
from cloudfs.commands.netstat import COLUMNS as SOCKET_COLUMNS
from cloudfs.commands.netstat import on_a_terminal
from cloudfs.commands.ps import _say_hidden
from cloudfs.render import table
from engine.types import ProcessInfo

PS_KEYS = """pid ppid name state uid gid threads start_time command_line executable architecture kernel_thread dtb
object""".split()


@pytest.fixture(scope="module")
def target():
    with running_target() as found:
        yield found


def document(*words: str):
    done = in_process(*words, "--json")
    assert done.returncode in (0, 4), done.stderr
    return json.loads(done.stdout)


# -- ps ----------------------------------------------------------------------------------------------


def test_ps_lists_the_processes_that_proc_lists(target):
    before = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    listed = [record["pid"] for record in document("ps")]
    after = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    assert before & after <= set(listed)
    assert len(set(listed) - before - after) < 0.2 * len(listed), "those that came and went meanwhile"
    assert listed == sorted(listed)
    assert target.pid in listed


def test_every_record_of_ps_has_every_key():
    for record in document("ps"):
        assert set(PS_KEYS) <= record.keys(), record


def test_a_record_of_ps_is_what_ps_and_proc_say(target):
    (record,) = document("ps", str(target.pid))
    status = Path(f"/proc/{target.pid}/status").read_text()
    assert record["pid"] == target.pid
    assert record["ppid"] == os.getpid()
    assert record["name"] == Path(f"/proc/{target.pid}/comm").read_text().rstrip("\n")
    assert record["state"] == re.search(r"State:\t(\S)", status)[1]
    assert (record["uid"], record["gid"]) == (os.getuid(), os.getgid())
    assert record["threads"] == int(re.search(r"Threads:\t(\d+)", status)[1])
    assert record["command_line"] == target.process.args
    assert record["executable"] == os.path.realpath(sys.executable)
    assert record["architecture"] == os.uname().machine
    assert record["kernel_thread"] is False
    assert record["dtb"] is None
    assert record["object"] is None


def test_the_start_of_a_process_is_the_time_in_utc(target):
    begun = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            (record,) = document("ps", str(process.pid))
        finally:
            process.kill()
    text = record["start_time"]
    assert text.endswith("Z")
    assert abs(datetime.datetime.fromisoformat(text).timestamp() - begun) < 3


def test_a_kernel_thread_is_one():
    name = Path("/proc/2/comm")
    require(name.exists() and name.read_text() == "kthreadd\n", "kernel threads cannot be seen here")
    (record,) = document("ps", "2")
    assert record["kernel_thread"] is True
    assert record["executable"] is None
    assert in_process("ps", "2").stdout.decode().rstrip("\n").endswith("kthreadd\t[kthreadd]")


def test_ps_in_a_pipe_is_tab_separated_without_titles(target):
    lines = in_process("ps").stdout.decode().splitlines()
    row = next(line.split("\t") for line in lines if line.startswith(f"{target.pid}\t"))
    assert len(row) == 8
    assert row[1] == str(os.getpid())
    assert row[2] == pwd.getpwuid(os.getuid()).pw_name
    assert row[4] == "1"
    assert row[7].startswith(sys.executable)
    assert all(len(line.split("\t")) == 8 for line in lines), "tabs and newlines of command lines are escaped"


def test_a_command_line_with_control_characters_is_escaped():
    words = ["sh", "-c", "echo; read x", "\x1b[31m\ttab\nline\udcff"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()  # Popen returns before exec(2) is through: the command line may still be empty
    try:
        shown = in_process("ps", str(process.pid)).stdout
        assert shown.endswith(b"\\033[31m\\011tab\\012line\\377\n")
        assert document("ps", str(process.pid))[0]["command_line"][2] == "echo; read x"
    finally:
        process.communicate()


def test_a_zombie_is_listed():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        (record,) = document("ps", str(process.pid))
        assert (record["state"], record["name"]) == ("Z", "true")
    finally:
        process.wait()


def test_another_user_sees_all_processes_too():
    done = unprivileged("ps", "--json")
    assert done.returncode == 0, done.stderr
    assert {1, os.getpid()} <= {record["pid"] for record in json.loads(done.stdout)}


# -- maps --------------------------------------------------------------------------------------------


def test_maps_is_byte_for_byte_what_proc_prints(target):
    for words in ([str(target.pid)], ["-p", str(target.pid)], ["native", str(target.pid)]):
        assert in_process("maps", *words).stdout == Path(f"/proc/{target.pid}/maps").read_bytes()


def test_maps_as_json_has_every_key_of_every_line(target):
    records = document("maps", str(target.pid))
    lines = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    assert len(records) == len(lines)
    for record, line in zip(records, lines, strict=True):
        span, permissions, offset, device, inode, *path = line.split(None, 5)
        start, stop = span.split("-")
        assert record == {
            "start": f"{int(start, 16):#x}", "stop": f"{int(stop, 16):#x}", "permissions": permissions,
            "offset": f"{int(offset, 16):#x}", "device": device, "inode": int(inode), "path": "".join(path),
            "source": None,
        }  # fmt: skip


# -- modules -----------------------------------------------------------------------------------------


def test_modules_are_what_is_mapped_with_what_readelf_says(target):
    require(shutil.which("readelf"), "there is no readelf(1)")
    records = document("modules", str(target.pid))
    assert all(record.keys() == {"name", "path", "base", "size", "architecture", "build_id"} for record in records)
    maps = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    libc = next(record for record in records if record["name"].startswith("libc.so"))
    first = next(line for line in maps if line.endswith(libc["path"]))
    assert libc["base"] == "0x" + first.split("-")[0]
    notes = subprocess.run(["readelf", "-n", libc["path"]], capture_output=True, text=True, timeout=60, check=True)
    assert f"Build ID: {libc['build_id']}\n" in notes.stdout
    assert libc["architecture"] == os.uname().machine
    row = next(
        line.split("\t")
        for line in in_process("modules", str(target.pid)).stdout.decode().splitlines()
        if libc["path"] in line
    )
    assert row == [libc["base"], str(libc["size"]), libc["architecture"], libc["build_id"], libc["name"], libc["path"]]


def test_without_a_pid_modules_are_those_of_the_kernel():
    listed = Path("/proc/modules")  # a kernel without loadable modules has no such file
    names = {line.split()[0] for line in listed.read_text().splitlines()} if listed.exists() else set()
    assert {record["name"] for record in document("modules")} >= names


@pytest.mark.parametrize("words", [("lsmod",), ("modules",), ("modules", "-p", "1")])
def test_modules_that_are_not_known_are_refused_and_never_an_empty_list(tmp_path, words):
    path = tmp_path / "image"
    path.write_bytes(image())
    done = in_process(*words, "-c", f"raw:{path}", "-o", f"raw-dtb:dtb={DTB:#x},arch=x86-64")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"is not known" in done.stderr


# -- info --------------------------------------------------------------------------------------------


def test_info_of_this_machine():
    record = document("info")
    assert record.keys() == {"target", "connector", "os", "problem"}
    assert record["connector"] is None
    system = record["os"]
    keys = "kind version architecture page_size kernel_base dtb boot_time processes skipped"
    assert set(keys.split()) <= system.keys()
    host = os.uname()
    assert (system["kind"], system["version"], system["architecture"]) == ("native", host.release, host.machine)
    assert system["page_size"] == os.sysconf("SC_PAGE_SIZE")
    boot = int(re.search(r"btime (\d+)", Path("/proc/stat").read_text())[1])
    assert abs(datetime.datetime.fromisoformat(system["boot_time"]).timestamp() - boot) <= 1
    assert abs(system["processes"] - sum(name.isdigit() for name in os.listdir("/proc"))) < 20


def test_info_of_a_process_has_the_keys_of_ps_and_more(target):
    record = document("info", str(target.pid))
    assert set(PS_KEYS) < record.keys()
    lines = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    assert record["regions"] == len(lines)
    spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in lines]
    assert record["mapped_bytes"] == sum(stop - start for start, stop in spans)
    assert record["modules"] == len(document("modules", str(target.pid)))


def test_info_as_text_has_a_line_for_each_key(target):
    text = in_process("info", str(target.pid)).stdout.decode()
    assert re.search(rf"^pid: +{target.pid}$", text, re.MULTILINE)
    assert re.search(r"^dtb: +-$", text, re.MULTILINE)


def test_what_may_not_be_read_of_a_process_is_null_and_said():
    pid = 1 if os.geteuid() else next(
        int(name) for name in os.listdir("/proc") if name.isdigit() and os.stat(f"/proc/{name}").st_uid == 0
    )  # fmt: skip
    done = unprivileged("info", str(pid), "--json")
    assert done.returncode == 4
    record = json.loads(done.stdout)
    assert (record["pid"], record["regions"], record["mapped_bytes"], record["modules"]) == (pid, None, None, None)
    assert f"the maps of process {pid} cannot be read" in done.stderr.decode()


def test_info_of_an_image_in_which_no_os_is_recognised_is_its_connector(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    record = document("info", str(image))
    assert record["os"] is None
    assert "no OS was recognised" in record["problem"]
    assert record["connector"]["kind"] == "raw"
    assert record["connector"]["size"] == 8192
    assert record["target"] == f"raw:{image}"


def test_info_of_a_pid_in_such_an_image_needs_an_os(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    done = in_process("info", str(image), "1")
    assert done.returncode == 1
    assert "no OS was recognised" in sentence(done)


# -- targets, plugins --------------------------------------------------------------------------------


def test_plugins_are_listed_with_what_they_are():
    records = {record["name"]: record for record in document("plugins")}
    assert {"raw", "dummy", "native"} <= records.keys()
    assert records["native"]["kind"] == "oslayer"
    assert all(record["problem"] is None for record in records.values())


BROKEN = """
import importlib.metadata, sys
from cloudfs.cli import main
class Distribution(importlib.metadata.Distribution):
    def read_text(self, name):
        return {"METADATA": "Name: broken\\nVersion: 1.2\\n",
                "entry_points.txt": "[cloudfs.connectors]\\nbroken = nosuchmodule:Thing\\n"}.get(name)
    def locate_file(self, path):
        return path
class Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, *_): return None
    def find_distributions(self, context=None): return [Distribution()]
sys.meta_path.append(Finder())
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "code"), [("plugins", 0), ("targets", 4), ("targets broken", 1), ("info -c broken", 1)]
)
def test_a_broken_plugin_breaks_itself_alone(words, code):
    done = subprocess.run([sys.executable, "-c", BROKEN, *words.split()], capture_output=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    said = (done.stdout + done.stderr).decode()
    assert "No module named 'nosuchmodule'" in said
    assert "Traceback" not in said
    if words == "plugins":
        assert "broken\tbroken 1.2" in said
        assert "native" in said


def test_a_terminal_gets_the_problem_of_a_plugin_whole():
    with on_terminal(["plugins"], 60, program=[sys.executable, "-c", BROKEN]) as terminal:
        assert terminal.finish() == 0
    assert "\nbroken is broken: " in (said := terminal.shown.decode().replace("\r", ""))
    assert "No module named 'nosuchmodule'" in said


def test_a_narrow_terminal_still_shows_whose_a_socket_is():
    row = dict.fromkeys((column.key for column in SOCKET_COLUMNS), None)
    row |= {"family": "inet6", "protocol": "tcp", "state": "ESTABLISHED", "pid": 4711, "descriptor": 12}
    row |= {"local": "[::ffff:127.0.0.1]:7100", "remote": "[::ffff:127.0.0.1]:51164"}
    title, line = (clip(one, 80) for one in table([row], on_a_terminal(), terminal=True).splitlines())
    assert {"PID", "FD", "LOCAL", "REMOTE"} <= set(title.replace("…", " ").split())
    assert "4711  12" in line
    assert "[::ffff:127.0.0.1]:7100" in line


def test_targets_is_an_array_of_what_can_be_opened():
    records = document("targets")
    assert all(record.keys() == {"plugin", "target", "description"} for record in records)
    assert document("targets", "raw") == []


def test_options_may_stand_before_the_command_word():
    done = cloudfs("--json", "ps", str(os.getpid()))
    assert json.loads(done.stdout)[0]["pid"] == os.getpid()


def test_a_process_that_one_list_alone_has_is_said_on_standard_error(capsys):
    both, one = {"sources": ["task ring", "pid numbers"]}, {"sources": ["pid numbers"]}
    infos = [ProcessInfo(1, "init", extra=both), *(ProcessInfo(pid, "evil\n", extra=one) for pid in range(2, 24))]
    _say_hidden(infos, Output("ps", json=False, no_color=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert "process 2 (evil\\012) is in the kernel's pid numbers alone" in lines[0]
    assert "so are 2 more" in lines[-1]
    _say_hidden([ProcessInfo(1, "init"), ProcessInfo(2, "sh")], Output("ps", json=False, no_color=True))
    assert not capsys.readouterr().err
