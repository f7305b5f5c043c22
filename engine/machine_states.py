"""What is to be said of a machine that does not run, in words for a person.

The keys are those of QEMU's RunState (qapi/run-state.json, 7.2 and 9.x), and three of ours: `stopped`, `restarting`,
`ended`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

RUNNING, STOPPED, RESTARTING, ENDED = "running", "stopped", "restarting", "ended"

SENTENCES: Mapping[str, str] = MappingProxyType({
    ENDED: "the program that ran it has ended: nothing of it can be read any more",
    STOPPED: "the program that runs it was stopped by a signal: what is shown stands still",
    "paused": "it is paused: what is shown stands still",
    "prelaunch": "it has not been started yet",
    "postmigrate": "it has been migrated away: what is shown is what it left here, and stands still for ever",
    "finish-migrate": "it is being migrated away: it stands still for a moment",
    "inmigrate": "it is being migrated to this place: what is shown is not all there yet",
    "save-vm": "it is being saved: it stands still meanwhile",
    "restore-vm": "it is being restored: what is shown is not all there yet",
    "shutdown": "it has been shut down: what is shown is what it left, and stands still",
    "suspended": "it sleeps (suspended to RAM)",
    "guest-panicked": "its kernel has panicked: what is shown is what it left, and stands still",
    "internal-error": "it was stopped by an error inside of QEMU: what is shown stands still",
    "io-error": "it was paused by an error of one of its disks: what is shown stands still",
    "watchdog": "it was paused by its watchdog: what is shown stands still",
    "debug": "it was stopped by a debugger: what is shown stands still",
    "colo": "it is the copy of another one that runs, and waits",
})  # fmt: skip
