"""The command line as a whole: finding commands, options, exit codes, errors in one sentence, what is imported."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commandline import COMMAND, cloudfs, environment, in_process, sentence, unprivileged
from support import require
from targets import running_target

import engine
from cloudfs.cli import command_names, load_command

MODULES, OUR_MODULES = 340, 85
"""Counted 298 and 73, of which numpy has 86."""
COMMANDS = [
    "completion", "dmesg", "info", "lsmod", "lsof", "maps", "modules", "mount", "netstat", "pagetree", "plugins", "ps",
    "read", "targets", "translate", "umount", "write",
]  # fmt: skip


def test_the_commands_are_the_files_of_the_package():
    assert list(command_names()) == COMMANDS


def test_alone_it_prints_a_short_tour():
    done = cloudfs()
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert len(lines) <= 24, "a screen"
    assert all(len(line) <= 100 for line in lines)
    assert all(f"cloudfs {name}" in done.stdout.decode() for name in ("ps", "maps", "read", "mount", "umount", "info"))


@pytest.mark.parametrize("words", ["--version", "ps --version", "--version ps"])
def test_version_is_that_of_the_package(words):
    done = cloudfs(*words.split())
    assert (done.returncode, done.stdout.decode()) == (0, f"cloudfs {engine.__version__}\n")


def test_help_names_every_command_and_exit_code():
    text = cloudfs("--help").stdout.decode()
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "130 interrupted" in text


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", ["NAME --help", "-h NAME", "help NAME"])
def test_help_of_a_command_shows_its_words_its_options_and_examples(name, words):
    if words != "NAME --help" and name not in ("ps", "mount"):
        return
    done = in_process(*words.replace("NAME", name).split())
    text = done.stdout.decode()
    assert done.returncode == 0
    assert f"usage: cloudfs {name}" in text
    assert "--json" in text
    assert f"  cloudfs {name}" in text.split("examples:")[1]
    assert all(len(line) <= 120 for line in text.splitlines())


def test_allow_other_says_what_it_lends():
    assert "ptrace" in cloudfs("mount", "--help").stdout.decode()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("pss", 2, "there is no command 'pss' (did you mean 'ps'?)"),
        ("ps --nosuch", 2, "there is no option --nosuch; `cloudfs ps --help`"),
        ("--nosuch", 2, "there is no option --nosuch"),
        ("ps a b c", 2, "3 words are too many: want [TARGET] [PID]"),
        ("maps", 2, "PID is missing"),
        ("read 1 2", 2, "2 words came, at least 3 are wanted: [TARGET] SPACE ADDRESS LENGTH"),
        ("read 1 ffff8880 16", 2, "write 0xffff8880"),
        ("read 1 zz 16", 2, "'zz' is no number"),
        ("read 1 0 -1", 2, "-1: addresses are not negative, nor are lengths"),
        ("read 1 -1 16", 2, "-1: addresses are not negative"),
        ("read 1 0x1ffffffffffffffff 16", 2, "behind the last one"),
        ("read --hex --raw 1 0 1", 2, "--raw and --hex exclude each other"),
        ("read --json --hex dummy physical 0 1", 2, "--json excludes"),
        ("write 1 0 00", 2, "--writable"),
        ("write --writable 1 0 0", 2, "two digits a byte"),
        ("write --writable 1 0 xy", 2, "not hexadecimal"),
        ("mount", 2, "MOUNTPOINT is missing"),
        ("mount -p 1 /tmp", 2, "no option -p"),
        ("mount -o ro,nonsense=1 /tmp", 2, "'nonsense=1' is no mount option"),
        ("mount -o ro --writable /tmp", 2, "contradicts --writable"),
        ("mount -o ro -o rw /tmp", 2, "contradicts -o rw"),
        ("mount -o uid=root /tmp", 2, "uid=root: want a number"),
        ("mount -o uid=4294967295 /tmp", 2, "want a number below"),
        ("mount --timeout nan /tmp", 2, "--timeout nan"),
        ("mount --timeout 0 /tmp", 2, "above 0"),
        ("mount --spin -1 /tmp", 2, "--spin"),
        ("mount --timeout soon /tmp", 2, "--timeout wants a number, not 'soon'"),
        ("umount", 2, "want one MOUNTPOINT"),
        ("umount /tmp/nosuch-cloudfs", 1, "nothing is mounted there"),
        ("umount /proc", 2, "not one of cloudfs"),
        ("plugins x", 2, "takes no words"),
        ("targets nosuch", 1, "no such connector; installed are"),
        ("targets native", 1, "an OS layer, no connector"),
        ("ps nosuch", 1, "there is no file 'nosuch', and no plugin of that name; a process by its name: -p nosuch"),
        ("info 1 nosuch.raw", 2, "PID comes behind TARGET"),
        ("ps ./1", 1, "there is no file './1'"),
        ("ps -f 1", 1, "there is no file './1'"),
        ("ps -f nosuch.raw", 1, "there is no file './nosuch.raw'"),
        ("ps -o nosuch", 1, "no such OS layer"),
        ("ps -o native:x=1", 2, "native has no option x="),
        ("ps dummy", 1, "no OS was recognised in dummy ("),
        ("ps dummy:size=1M", 1, "no OS was recognised in dummy:size=1M ("),
        ("ps dummy:size=5", 2, "multiple of 4K"),
        ("ps -c dummy -c dummy", 2, "a chain alternates"),
        ("ps raw:'x", 2, "a quote is not closed"),
        ("ps nonsense://host/image", 2, "nonsense"),
        ("ps /", 1, "is a directory, not an image"),
        ("ps /dev/null", 1, "neither a regular file nor a block device"),
        ("info 99999999999999999999999", 3, "no PID is that large"),
        ("info 4194305", 3, "has no process 4194305"),
        ("maps nosuchprocess", 3, "no process of this machine is called 'nosuchprocess'"),
        ("maps dummy", 2, "as TARGET it wants one more word"),
        ("read kernel 0 16", 3, "shows no kernel memory"),
        ("read physical 0 16", 3, "shows no physical memory"),
        ("read dummy kernel 0 16", 1, "no OS was recognised"),
        ("--log-file /nosuch/log ps", 1, "/nosuch/log: No such file or directory"),
        ("ps \x1b[31mred", 1, "no plugin of that name"),
        ("\x1b[31mred", 2, "no command"),
        ("ps --\x9b31m", 2, "no option"),
        ("ps \udcff", 1, "no plugin of that name"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_the_right_exit_code(words, code, says):
    done = in_process(*words.split(" "))
    assert (done.returncode, says in sentence(done)) == (code, True), sentence(done)
    assert sentence(done).isprintable()


def test_a_sentence_names_the_command():
    assert sentence(cloudfs("maps", "4194305")).startswith("cloudfs maps: ")


@pytest.mark.parametrize("kind", ["an empty file", "an ELF file", "a FIFO"])
def test_an_image_that_cannot_be_used_is_one_sentence(tmp_path, kind):
    image = tmp_path / "image"
    says = kind
    if kind == "an empty file":
        image.write_bytes(b"")
        says = "is empty"
    elif kind == "an ELF file":
        image.write_bytes(Path(sys.executable).read_bytes()[:8192])
    else:
        os.mkfifo(image)
        says = "neither a regular file nor a block device"
    done = in_process("info", str(image))
    assert done.returncode == 1
    assert says in sentence(done)


def test_an_image_that_may_not_be_read_is_one_sentence():
    with tempfile.NamedTemporaryFile(dir="/tmp") as image:
        image.write(bytes(4096))
        image.flush()
        os.chmod(image.name, 0)
        done = unprivileged("info", image.name)
    assert done.returncode == 1
    assert sentence(done) == f"cloudfs info: {image.name}: Permission denied; run it as root, or as a user who may"


def test_another_user_is_told_that_he_may_not_read_a_process():
    with running_target() as target:
        pid = target.pid if os.geteuid() == 0 else 1
        require(os.geteuid() == 0 or os.stat("/proc/1").st_uid != os.geteuid(), "all processes belong to this user")
        done = unprivileged("read", str(pid), hex(target.secret), "16")
    assert done.returncode == 1
    assert f"process {pid}" in sentence(done)
    assert "root" in sentence(done)


def test_a_bug_is_one_sentence_without_a_traceback(monkeypatch):
    import cloudfs.commands.plugins as command

    monkeypatch.setattr(command, "run", lambda arguments: {}["nothing"])
    done = in_process("plugins")
    assert done.returncode == 1
    assert "KeyError" in sentence(done)
    assert "report" in sentence(done)


def test_errors_of_a_real_process_are_those_of_the_table():
    done = cloudfs("ps", "nosuch")
    assert done.returncode == 1
    assert sentence(done) == (
        "cloudfs ps: there is no file 'nosuch', and no plugin of that name; a process by its name: -p nosuch"
    )


def test_with_vv_the_traceback_is_in_the_log_and_only_there(tmp_path):
    log = tmp_path / "log"
    done = cloudfs("ps", "nosuch", "-vv", "--log-file", str(log))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr.decode()
    assert "NotFoundError" in log.read_text()
    assert "Traceback" in log.read_text()


def test_a_log_that_cannot_be_written_is_no_traceback():
    done = cloudfs("-v", "-v", "--log-file", "/dev/full", "plugins")
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_log_is_appended_to(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    cloudfs("-vv", "--log-file", str(log), "plugins")
    assert log.read_text().startswith("before\n")
    assert len(log.read_text().splitlines()) > 1


# -- streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["ps", "read dummy physical 0 64M", "read --hex dummy physical 0 64M", "--help"])
def test_a_reader_that_has_enough_is_no_error(words):
    process = subprocess.Popen(
        [*COMMAND, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert said == b""


def test_a_reader_that_was_never_there_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "ps"], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False, env=environment()
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", ["ps", "read dummy physical 0 64M", "--json plugins"])
def test_a_full_disk_is_one_sentence(words):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *words.split()], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False, env=environment()
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        f"cloudfs {words.split()[-1] if 'json' in words else words.split()[0]}: "
        "standard output cannot be written: No space left on device"
    ]


@pytest.mark.parametrize("words", ["ps", "plugins --json", "read dummy physical 0 16", ""])
def test_a_closed_standard_output_is_one_sentence(words):
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *words.split()],
        capture_output=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert sentence(done).endswith(": standard output cannot be written: it is closed")


def test_closed_streams_are_no_traceback():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND, "plugins"], timeout=60, check=False, env=environment()
    )
    assert done.returncode == 1


def test_ctrl_c_is_130_and_silent():
    process = subprocess.Popen(
        [*COMMAND, "read", "dummy:size=1T", "physical", "0", "1T"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == b""


@pytest.mark.parametrize("place", ["while the command line is imported", "when the command is done"])
def test_ctrl_c_before_and_behind_the_command_is_130_and_silent(place):
    """A module that interrupts its own import stands for Ctrl-C there; a function called at exit for Ctrl-C then."""
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(20)"
    code = {
        "while the command line is imported": (
            "import sys\nclass Slow:\n"
            "  def find_spec(self, name, *_):\n"
            f"    if name == 'cloudfs.commands._streams': {interrupt}\n"
            "sys.meta_path.insert(0, Slow())\n"
        ),
        "when the command is done": f"import atexit; atexit.register(lambda: exec({interrupt!r}))\n",
    }[place]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}import sys; from cloudfs.start import main; sys.exit(main())", "--version"],
        capture_output=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, b"")


def test_an_ignored_ctrl_c_stays_ignored():
    code = "import signal; from cloudfs.start import main; main(); print(signal.getsignal(2) is signal.SIG_IGN)"
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code, "--version"],
        capture_output=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == b"True"


# -- examples ----------------------------------------------------------------------------------------


def examples() -> list[str]:
    found = []
    for name in COMMANDS:
        for line in load_command(name).EXAMPLES.splitlines():
            command = re.split(r"\s{2,}|\s[|>]\s", line.strip())[0]
            if command.startswith("cloudfs ") and name not in ("mount", "umount", "write"):
                found.append(command.removeprefix("cloudfs "))
    return found


@pytest.mark.parametrize("words", examples())
def test_an_example_of_help_works_with_what_is_installed(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = bytearray(2 << 20)
    struct.pack_into("<Q", memory, 0x1AD000, 0x1AE003)  # the page table that examples name: its first GiB is RAM
    struct.pack_into("<Q", memory, 0x1AE000, 0x83)
    Path("memory.raw").write_bytes(memory)
    done = in_process(*words.split())
    # 3 and 4: there is no sshd here, or nothing at the address; 1 only where another process may not be read, or
    # where the example wants an OS in its image, which is empty here, or a guest, of which none or several may run.
    empty = "memory.raw" in words and b"no OS was recognised" in done.stderr
    empty = empty or ("qemu" in words and re.search(b"QEMU|guest", done.stderr) is not None)
    assert done.returncode in (0, 3, 4) or b"ermi" in done.stderr or empty, done.stderr.decode()


def test_a_name_that_the_locale_cannot_show_is_escaped():
    done = cloudfs("info", "raw:/nosuch-\N{SNOWMAN}", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 1
    assert b"nosuch" in done.stderr


def test_where_nothing_can_be_listed_that_is_said():
    done = cloudfs("targets", "raw")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"nothing runs here" in done.stderr
    assert json.loads(cloudfs("targets", "raw", "--json").stdout) == []


# -- cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["ps", "maps 1", "info", "read 1 0 16", "plugins", "targets"])
def test_only_mount_imports_pyfuse3_and_trio(words):
    code = (
        "import sys; from cloudfs.cli import main; main(sys.argv[1:]); sys.stdout.flush();"
        "print([m for m in ('pyfuse3', 'trio', 'psutil', 'asyncio', 'importlib.metadata', 'cloudfs.commands.mount')"
        " if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, timeout=60, check=False, env=environment()
    )
    found = done.stderr.decode().splitlines()[-1]
    assert found in ("[]", "['importlib.metadata']" if words in ("plugins", "targets") else "[]")


def test_the_tour_and_what_mount_forks_from_do_not_import_numpy():
    code = "import sys; from cloudfs.cli import main; main(sys.argv[1:]); sys.exit('numpy' in sys.modules)"
    for words in ([], ["--version"], ["mount", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, words


def test_the_first_table_takes_few_modules():
    """Most of the third of a second that it may take is importing."""
    code = (
        "import sys; from cloudfs.cli import main; main(['ps']); sys.stdout.flush();"
        "print(len(sys.modules), sum(name.startswith(('engine', 'cloudfs')) for name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True, env=environment())
    every, ours = map(int, done.stderr.split()[-2:])
    assert every < MODULES
    assert ours < OUR_MODULES


def test_reading_needs_no_more_memory_for_more_bytes():
    def peak(length: str) -> int:
        code = (
            "import resource, subprocess, sys;"
            "subprocess.run([sys.executable, '-m', 'cloudfs', *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        words = ["read", "--raw", "dummy:size=1G", "physical", "0", length]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=60, check=True)
        return int(done.stdout)

    assert peak("512M") < peak("4M") + (16 << 10)


def test_json_is_one_document_for_every_command_that_lists():
    for words in ("ps", "maps PID", "modules", "targets", "plugins", "info", "info PID", "read dummy physical 0 16"):
        done = in_process(*words.replace("PID", str(os.getpid())).split(), "--json")
        assert done.returncode in (0, 4), words
        json.loads(done.stdout)
