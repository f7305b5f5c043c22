"""cloudfs completion: the shells themselves load the scripts and say what they offer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from commandline import cloudfs, sentence
from support import require

from cloudfs.commands._catalogue import command_names, parser_of


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        done = cloudfs("completion", shell)
        assert done.returncode == 0, done.stderr
        (folder / shell).write_bytes(done.stdout)
    return folder


def offered(scripts, *words: str, folder=None) -> set[str]:
    """What bash offers for the last word."""
    code = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _cloudfs; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", f"compopt() {{ :; }}; {code}", "bash", str(scripts / "bash"), "cloudfs", *words],
        capture_output=True, text=True, timeout=20, check=False, cwd=folder,
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.splitlines()) - {""}


def test_bash_completes_the_commands(scripts):
    assert offered(scripts, "m") == {"maps", "modules", "mount"}
    assert set(command_names()) <= offered(scripts, "")


@pytest.mark.parametrize("name", command_names())
def test_bash_completes_every_option_of_the_parser(scripts, name):
    wanted = {text for action in parser_of(name)._actions for text in action.option_strings}
    assert offered(scripts, name, "-") == wanted


def test_bash_completes_pids(scripts):
    me = str(os.getpid())
    assert me in offered(scripts, "maps", me)
    assert me in offered(scripts, "ps", "-p", me[:1])
    assert all(word.isdigit() for word in offered(scripts, "ps", "-p", ""))


def test_bash_completes_plugins(scripts):
    assert offered(scripts, "ps", "-c", "") >= {"raw", "dummy"}
    assert offered(scripts, "ps", "-o", "n") == {"native"}
    assert offered(scripts, "mount", "-o", "a") == {"auto"}


def test_bash_finds_the_command_behind_options_and_their_values(scripts):
    assert "--daemon" in offered(scripts, "-v", "--log-file", "ps", "mount", "--d")


def test_bash_completes_a_target_by_the_names_of_files_as_they_are(scripts, tmp_path):
    names = {"zz two words.raw", "zz*", "zz$(id)", "zz\\"}
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert offered(scripts, "info", "zz", folder=tmp_path) == names


def test_bash_completes_a_mount_point_by_directories_alone(scripts, tmp_path):
    (tmp_path / "yyfile").write_bytes(b"")
    (tmp_path / "yy folder").mkdir()
    assert offered(scripts, "umount", "yy", folder=tmp_path) == {"yy folder"}


def test_zsh_takes_the_script(scripts):
    require(shutil.which("zsh"), "zsh is missing")
    code = (
        'autoload -U compinit && compinit -D -u; source "$1" && print $_comps[cloudfs]; words=(cloudfs m); CURRENT=2\n'
        '_describe() { print -l -- $known }; _cloudfs\n_arguments() { print -l -- $* }; words=(cloudfs umount -); '
        "CURRENT=3; _cloudfs"
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", code, "zsh", str(scripts / "zsh")], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "_cloudfs"
    assert {line.split(":")[0] for line in lines} >= set(command_names())
    assert any(line.startswith("*--force[") for line in lines)
    assert "*:word:_cloudfs_offer directory" in lines


def test_fish_completes_commands_options_and_pids(scripts):
    require(shutil.which("fish"), "fish is missing")

    def by_fish(line: str) -> set[str]:
        code = f'source "{scripts / "fish"}"; complete -C "{line}"'
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], capture_output=True, text=True, timeout=20, check=False,
            env={**os.environ, "HOME": str(scripts)},
        )  # fmt: skip
        assert done.stderr == ""
        return {row.split("\t")[0] for row in done.stdout.splitlines()}

    assert by_fish("cloudfs m") == {"maps", "modules", "mount"}
    assert "--force" in by_fish("cloudfs umount --f")
    assert str(os.getpid()) in by_fish(f"cloudfs maps {os.getpid()}")
    assert {"raw", "dummy"} <= by_fish("cloudfs ps -c ")


def test_an_unknown_shell_is_wrong_usage():
    done = cloudfs("completion", "tcsh")
    assert done.returncode == 2
    assert "bash" in sentence(done)


def test_its_json_holds_the_script(scripts):
    assert json.loads(cloudfs("completion", "bash", "--json").stdout)["script"] == (scripts / "bash").read_text()
