"""Import every module of the package where the modules and functions that Windows lacks are missing."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys

#: Modules of the standard library that Windows lacks.
POSIX = (
    "_posixsubprocess", "crypt", "curses", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd", "readline",
    "resource", "spwd", "syslog", "termios", "tty",
)  # fmt: skip
SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCHLD")
FUNCTIONS = (
    "fork",
    "forkpty",
    "geteuid",
    "getgid",
    "getuid",
    "killpg",
    "mkfifo",
    "sched_getaffinity",
    "sysconf",
    "uname",
)


def main() -> None:
    """Import the package anew, the libraries that it uses having been imported."""
    import fasc_lightning

    names = [m.name for m in pkgutil.walk_packages(fasc_lightning.__path__, "fasc_lightning.")]
    for name in names:  # the libraries' own imports, which are not in question
        if name.rpartition(".")[2] not in ("bundled", "distillation"):  # old paths, which warn
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fasc_lightning"]:
        del sys.modules[name]
    for name in POSIX:
        sys.modules[name] = None  # type: ignore[assignment]
    for holder, missing in ((signal, SIGNALS), (os, FUNCTIONS)):
        for name in missing:
            if hasattr(holder, name):
                delattr(holder, name)
    for name in names:
        if name.rpartition(".")[2] not in ("bundled", "distillation"):
            importlib.import_module(name)
    try:
        import resource  # noqa: F401
    except ImportError:
        sys.stdout.write(f"imported {len(names)} modules\n")
        sys.stdout.flush()
        os._exit(0)  # the interpreter's own end may need what is missing here


if __name__ == "__main__":
    main()
