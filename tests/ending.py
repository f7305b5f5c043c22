"""How what tests start ends with them. Knows nothing of pytest: programs under scripts/ start guests, too."""

from __future__ import annotations

import shutil


def ends_with_us(signal: str = "KILL") -> list[str]:
    """Words before a command, by which it gets that signal when our thread ends, even killed (setpriv of util-linux).

    For what is started in the main thread: the kernel looks at the thread, not at the program (prctl(2)).
    """
    return ["setpriv", "--pdeathsig", signal] if shutil.which("setpriv") else []
