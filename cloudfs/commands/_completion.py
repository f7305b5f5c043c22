"""What a shell can complete, read from the parsers, and the scripts that bash, zsh and fish load."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from cloudfs.commands._arguments import VALUE_OPTIONS, Parser
from cloudfs.commands._catalogue import command_names, parser_of, summary
from engine import registry
from engine.chain import NAME_PATTERN
from engine.records import dataclass

KINDS: Mapping[str, str] = {
    "FILE": "file",
    "MOUNTPOINT": "directory",
    "OPTION": "oslayer",
    "PID": "process",
    "PLUGIN": "connector",
    "SHELL": "shell",
    "SPACE": "process",
    "TARGET": "target",
}
"""The names of words and of values, as help prints them, and what is offered for them."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command."""

    names: tuple[str, ...]
    help: str
    metavar: str | None
    """How help calls its value; None where it takes none."""
    kind: str
    """What is offered for its value; "" where nothing is."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name, its options, and the kinds of its words."""

    name: str
    summary: str
    options: tuple[Option, ...]
    kinds: tuple[str, ...]


def options_of(parser: Parser) -> Iterator[Option]:
    """The options of a parser, in the order of its help."""
    for action in parser._actions:
        if not action.option_strings or action.help is argparse.SUPPRESS:
            continue
        names = tuple(action.option_strings)
        metavar = None if action.nargs == 0 else str(action.metavar or action.dest.upper())
        kind = KINDS.get(re.split(r"[^A-Z]", metavar)[0], "") if metavar else ""
        if kind == "connector" and "--os" in names:
            kind = "oslayer"
        yield Option(names, action.help or "", metavar, kind)


def commands() -> list[Command]:
    """All commands."""
    found = []
    for name in command_names():
        parser = parser_of(name)
        words = re.findall(r"[A-Z]{2,}", parser.usage or "")
        kinds = dict.fromkeys(KINDS[word] for word in words if word in KINDS)
        found.append(Command(name, summary(name), tuple(options_of(parser)), tuple(kinds)))
    return found


def _plugins(kind: registry.Kind) -> list[str]:
    """Their names; one that a shell would take for more than a name is left out."""
    return [plugin.name for plugin in registry.plugins(kind) if NAME_PATTERN.fullmatch(plugin.name)]


def _names(kind: str) -> list[str]:
    """The words that are offered for a kind, where they are known beforehand."""
    connectors, layers = _plugins("connector"), [*_plugins("oslayer"), registry.AUTO]
    lists = {"connector": connectors, "oslayer": layers, "shell": sorted(SCRIPTS)}
    lists["target"] = [*connectors, *_plugins("oslayer")]
    return lists.get(kind, [])


# -- bash --------------------------------------------------------------------------------------------

_BASH = """\
# Completion of cloudfs for bash, made by `cloudfs completion bash`; load it with: source <(cloudfs completion bash)
_cloudfs_add() {
    local found
    mapfile -t found
    COMPREPLY+=("${found[@]}")
}
_cloudfs_offer() {
    case $1 in
@KINDS@
    file) compopt -o filenames; _cloudfs_add < <(compgen -f -- "$cur") ;;
    directory) compopt -o filenames; _cloudfs_add < <(compgen -d -- "$cur") ;;
    process) _cloudfs_add < <(cd /proc && compgen -W "$(printf '%s ' [0-9]*)" -- "$cur") ;;
    esac
}
_cloudfs() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= word options kinds value= skip=
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [ -n "$skip" ]; then skip=; continue; fi
        case $word in
        @VALUE_OPTIONS@) skip=1 ;;
        -*) ;;
        *) command=$word; break ;;
        esac
    done
    if [ -z "$command" ] && [ -z "$skip" ]; then
        _cloudfs_add < <(compgen -W "@COMMANDS@ help --help --version" -- "$cur")
        return
    fi
    case $command in
@OPTIONS@
    esac
    case $command:$prev in
@VALUES@
    esac
    if [ -n "$value" ]; then
        _cloudfs_offer "$value"
    elif [[ $cur == -* ]]; then
        _cloudfs_add < <(compgen -W "$options" -- "$cur")
    else
        for value in $kinds; do _cloudfs_offer "$value"; done
    fi
}
complete -F _cloudfs cloudfs
"""


def _bash(known: Sequence[Command]) -> str:
    kinds, options, values = [], [], []
    for kind in ("connector", "oslayer", "shell", "target"):
        files = "; _cloudfs_offer file" if kind == "target" else ""
        kinds.append(f'    {kind}) _cloudfs_add < <(compgen -W "{" ".join(_names(kind))}" -- "$cur"){files} ;;')
    for command in known:
        names = " ".join(name for option in command.options for name in option.names)
        options.append(f'    {command.name}) options="{names}" kinds="{" ".join(command.kinds)}" ;;')
        for option in command.options:
            if option.metavar is not None:
                patterns = "|".join(f"{command.name}:{name}" for name in option.names)
                values.append(f"    {patterns}) value={option.kind or 'nothing'} ;;")
    return _filled(_BASH, KINDS=kinds, OPTIONS=options, VALUES=values, COMMANDS=[" ".join(c.name for c in known)])


def _filled(template: str, **parts: Sequence[str]) -> str:
    text = template.replace("@VALUE_OPTIONS@", "|".join(sorted(VALUE_OPTIONS)))
    for name, lines in parts.items():
        text = text.replace(f"@{name}@", "\n".join(lines))
    return text


# -- zsh ---------------------------------------------------------------------------------------------

_ZSH = """\
#compdef cloudfs
# Completion of cloudfs for zsh, made by `cloudfs completion zsh`; store it as _cloudfs in a folder of $fpath,
# or load it with: source <(cloudfs completion zsh)
_cloudfs_offer() {
    local kind
    for kind in $*; do
        case $kind in
@KINDS@
        file) _files ;;
        directory) _files -/ ;;
        process) compadd -- /proc/<->(N:t) ;;
        esac
    done
}
_cloudfs_command() {
    local -a known=(
@COMMANDS@
    )
    _describe command known
}
_cloudfs() {
    local command=$words[2]
    if (( CURRENT == 2 )); then
        _cloudfs_command
        return
    fi
    shift words
    (( CURRENT-- ))
    case $command in
@OPTIONS@
    esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _cloudfs "$@"
else
    compdef _cloudfs cloudfs
fi
"""


def _zsh(known: Sequence[Command]) -> str:
    kinds, options, names = [], [], []
    for kind in ("connector", "oslayer", "shell", "target"):
        files = "; _files" if kind == "target" else ""
        kinds.append(f"        {kind}) compadd -- {' '.join(_names(kind))}{files} ;;")
    for command in known:
        names.append(f"        {shlex.quote(f'{command.name}:{command.summary}')}")
        specs = [_zsh_option(option) for option in command.options]
        words = f"*:word:_cloudfs_offer {' '.join(command.kinds)}"
        lines = " \\\n".join(f"            {spec}" for spec in [*specs, shlex.quote(words)])
        options.append(f"    {command.name})\n        _arguments -s -S \\\n{lines} ;;")
    return _filled(_ZSH, KINDS=kinds, OPTIONS=options, COMMANDS=names)


def _zsh_option(option: Option) -> str:
    text = re.sub(r"([\[\]:\\])", r"\\\1", option.help)
    value = f":{re.split(r'[^A-Z|]', option.metavar)[0]}:_cloudfs_offer {option.kind}" if option.metavar else ""
    return " ".join(shlex.quote(f"*{name}[{text}]{value}") for name in option.names)


# -- fish --------------------------------------------------------------------------------------------


def _fish(known: Sequence[Command]) -> str:
    lines = [
        "# Completion of cloudfs for fish, made by `cloudfs completion fish`;",
        "# load it with: cloudfs completion fish | source",
        "function __cloudfs_processes",
        "    string match -r '[0-9]+$' -- /proc/*",
        "end",
        "complete -c cloudfs -f",
    ]
    for command in known:
        name, text = command.name, _fish_quote(command.summary)
        lines.append(f"complete -c cloudfs -n __fish_use_subcommand -a {name} -d {text}")
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c cloudfs {seen} {_fish_words(kind)}" for kind in command.kinds]
        for option in command.options:
            spelled = " ".join(f"{'-l' if word.startswith('--') else '-s'} {word.lstrip('-')}" for word in option.names)
            value = "" if option.metavar is None else f" -x {_fish_words(option.kind)}".rstrip()
            value = value.replace("-x -F", "-r -F")
            lines.append(f"complete -c cloudfs {seen} {spelled}{value} -d {_fish_quote(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_words(kind: str) -> str:
    if kind == "process":
        return "-a '(__cloudfs_processes)'"
    if kind == "directory":
        return "-a '(__fish_complete_directories)'"
    names = " ".join(_names(kind))
    words = f"-a {_fish_quote(names)}" if names else ""
    return f"-F {words}".rstrip() if kind in ("file", "target") else words


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS: Mapping[str, Callable[[Sequence[Command]], str]] = {"bash": _bash, "fish": _fish, "zsh": _zsh}


def script(shell: str) -> str:
    """The script that a shell loads. Raises KeyError for a shell that is not known."""
    return SCRIPTS[shell](commands())
