"""The command line: finds the command, runs it, and turns what it raises into one sentence and an exit code.

To add a command, write `cloudfs/commands/NAME.py`; its name is the file's. It needs

    a docstring               whose first line says what the command does
    EXAMPLES: str             lines for --help
    configure(parser)         its usage and its options
    run(arguments) -> int     one of `Exit`

A command is imported when it is used and only then: what is heavy for it costs no other.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from cloudfs.commands._arguments import Exit, Parser, UsageError, add_common_options, parse, split_command
from cloudfs.commands._catalogue import command_names, load_command, parser_of, summary
from cloudfs.commands._streams import OutputError, ReaderGoneError, flush, put, say

log = logging.getLogger("cloudfs")

TOUR = """\
cloudfs shows the memory of a machine - this one, a virtual machine, a dump - as files and tables.

Look at this machine:
  cloudfs ps                               its processes
  cloudfs maps {pid:<27} what is mapped into one of them (here: your shell)
  cloudfs read {pid_address:<27} its memory at an address that maps has shown

Mount it, and use what you have (ls, cat, grep, xxd, gdb):
  mkdir /tmp/machine
  cloudfs mount --daemon /tmp/machine      then: cat /tmp/machine/README
  cloudfs umount /tmp/machine

Look into an image of physical memory:
  cloudfs info memory.raw                  what it is
  cloudfs read memory.raw physical 0 4K    its first bytes

`cloudfs --help` lists all commands, `cloudfs COMMAND --help` shows examples of one.
"""

ABOUT = """
TARGET (left out: this machine) is an image file, or PLUGIN[:TARGET][:KEY=VALUE,...]; longer chains with
-c CONNECTOR and -o OSLAYER, in the order in which they stand on one another. -f FILE and -p PID|NAME say
that a word is a file or a process. Numbers may be written 4096, 0x1000, 4K, 2M.

options of every command: --json  -v, -vv  --log-file FILE  --no-color  --version  -h, --help

exit codes: 0 done, 1 the target is not there, failed or was not recognised, 2 wrong usage, 3 no such process,
module or address space in it, 4 done but part of it could not be read (standard error says what), 130 interrupted

examples:
  cloudfs ps                              the processes of this machine
  cloudfs maps -p sshd                    what is mapped into the only process called sshd
  cloudfs info memory.img                 what an image is
  cloudfs ps memory.img                   the processes of the Linux machine in it
  cloudfs ps -c qemu:web-01               those of a guest that runs here
  cloudfs mount --daemon /tmp/machine     this machine as files
"""


def _help() -> str:
    lines = ["usage: cloudfs COMMAND [OPTIONS] [WORDS]", "", "commands:"]
    lines += [f"  {name:<12}{summary(name)}" for name in command_names()]
    return "\n".join(lines) + "\n" + ABOUT


def _version() -> str:
    from engine import __version__

    return f"cloudfs {__version__}\n"


def configure_logging(verbose: int, file: str | None) -> None:
    """Send the log to standard error or to a file: warnings; with -v what is done; with -vv all, with tracebacks."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("cloudfs: %(levelname)s: %(message)s"))
    else:
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)], force=True
    )
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False  # a log that cannot be written is no reason for a traceback


def main(
    words: Sequence[str] | None = None,
    *,
    forgive: Callable[[BaseException], bool] | None = None,
    loaded: Callable[[], None] = lambda: None,
) -> int:
    """Run one command line and give its exit code; never raises.

    An error that `forgive` accepts is none. `loaded` is called when the command is imported and is about to run.
    """
    # numpy's threads for matrices have nothing to do here, and take 0.1 s of CPU to start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    name: str | None = None
    words = sys.argv[1:] if words is None else words
    try:
        _prepare_streams()
        name, rest = split_command(words)
        code = _run(name, rest, loaded)
        flush()
    except BaseException as error:  # the one boundary: whatever happened becomes a sentence and a code
        if forgive is not None and forgive(error):
            log.info("%s", error)
            return Exit.DONE
        code = _failed(name, error, no_color="--no-color" in words)
    return code


def _prepare_streams() -> None:
    """A closed standard output takes nothing, as ever; a character that a stream cannot encode is escaped.

    In ascending order: each gets the lowest number that is free, which is its own.
    """
    if sys.stdin is None:  # reading it gives EBADF as before, but nothing else gets its number
        os.open(os.devnull, os.O_WRONLY)
    if sys.stdout is None:  # what is not open for writing gives EBADF as soon as something is printed
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", closefd=False)  # noqa: SIM115 - open as long as the program
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as above
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # tests put other objects there
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _run(name: str | None, words: list[str], loaded: Callable[[], None]) -> int:
    if name == "help":
        name, words = split_command(words)
        words.append("--help")
    if name is None:
        return _run_alone(words)
    command = load_command(name)
    parser = parser_of(name)
    arguments = parse(parser, words)
    if arguments.help or arguments.version:
        put(parser.format_help() if arguments.help else _version())
        return Exit.DONE
    configure_logging(arguments.verbose, arguments.log_file)
    if getattr(arguments, "no_cache", False):  # for the daemon of a mount too
        os.environ["CLOUDFS_NO_CACHE"] = "1"
    log.debug("cloudfs %s %s", name, words)
    loaded()
    return int(command.run(arguments))


def _run_alone(words: list[str]) -> int:
    parser = Parser(prog="cloudfs")
    add_common_options(parser)
    arguments = parse(parser, words)
    if arguments.words:
        raise UsageError(f"{arguments.words[0]!r} is no command")
    tour = TOUR.format(pid=os.getppid(), pid_address=f"{os.getppid()} ADDRESS 256")
    put(_version() if arguments.version else _help() if arguments.help else tour)
    return Exit.DONE


# -- what went wrong ---------------------------------------------------------------------------------


def exit_code(error: BaseException) -> Exit:
    """What an error means to the shell."""
    from cloudfs.commands._opening import AbsentError
    from engine.errors import InvalidArgumentError, ProcessExitedError, UnusableTargetError

    if isinstance(error, InvalidArgumentError) and not isinstance(error, UnusableTargetError):
        return Exit.USAGE
    return Exit.ABSENT if isinstance(error, AbsentError | ProcessExitedError) else Exit.FAILED


def sentence(error: BaseException) -> str:
    """What a person is told of an error, in one sentence."""
    from engine.errors import EngineError

    if isinstance(error, EngineError | OutputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        what = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        denied = error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0
        hint = "; run it as root, or as a user who may" if denied else ""
        return f"{what}{error.strerror}{hint}"
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"this is a fault of cloudfs ({text}); please report it with the log of -vv --log-file FILE"


def _failed(name: str | None, error: BaseException, *, no_color: bool) -> int:
    """Say what went wrong, and give the exit code."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever presses Ctrl-C twice wants no traceback either
    log.debug("cloudfs %s failed", name, exc_info=error)
    if isinstance(error, KeyboardInterrupt):
        _drop_output(flush=False)  # a pager that reads no more would make us wait
        return Exit.INTERRUPTED
    name = name if name in command_names() else ""
    if isinstance(error, UsageError):  # before anything heavy is imported
        _say(name, f"{error}; `cloudfs {name + ' ' if name else ''}--help` shows how it is written", no_color)
        return Exit.USAGE
    _drop_output(flush=not isinstance(error, OutputError))
    if isinstance(error, ReaderGoneError):
        return Exit.DONE
    _say(name, sentence(error), no_color)
    return exit_code(error)


def _say(name: str, text: str, no_color: bool) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening
        say(name, text, no_color=no_color)


def _drop_output(*, flush: bool) -> None:
    """Make sure that what is left for standard output disturbs nobody when Python flushes it at its exit."""
    with contextlib.suppress(OSError, ValueError):
        if flush:
            sys.stdout.flush()
            return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
