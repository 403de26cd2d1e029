"""Run hvdrec, but let one rank get into trouble at its third training step.

trouble.py KIND RANK NOTE ARGUMENT...: hvdrec gets the arguments; the time is written to NOTE.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdrec import cli
from hvdrec.errors import UserError
from hvdrec.parallel import ranks
from hvdrec.training import trainer

STEP = 3


def fail() -> None:
    raise RuntimeError("the sky has fallen")


def fail_by_mistake() -> None:
    raise UserError("a shard is damaged; write it again")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def lose_network() -> None:
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


KINDS: dict[str, Callable[[], None]] = {
    "fail": fail,
    "mistake": fail_by_mistake,
    "killed": be_killed,
    "stopped": be_stopped,
    "cut": lose_network,
}


def main() -> None:
    kind, rank, note = KINDS[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
    take_step = trainer.take_step

    def take_step_or_fail(*arguments: Any) -> Any:
        if arguments[2] == STEP and ranks.current().rank == rank:
            note.write_text(str(time.time()))
            kind()
        return take_step(*arguments)

    trainer.take_step = take_step_or_fail
    cli.main(sys.argv[4:])


if __name__ == "__main__":
    main()
