"""Run a command at a terminal that never answers: terminal.py COMMAND..."""

from __future__ import annotations

import os
import pty
import sys
from contextlib import suppress


def main() -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(sys.argv[1], sys.argv[1:])
    with suppress(OSError):  # the command has closed the terminal
        while output := os.read(terminal, 65536):
            os.write(1, output)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
