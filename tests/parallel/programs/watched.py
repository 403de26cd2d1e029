"""Run barriers until rank 1 gets into the trouble named by the argument."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from hvdrec.errors import SharedError, UserError
from hvdrec.parallel import ranks
from hvdrec.parallel.watchdog import watched


def fail() -> None:
    raise RuntimeError("the sky\nhas fallen")


def mistake() -> None:
    raise UserError("a shard is damaged")


TROUBLES: dict[str, Callable[[], object]] = {
    "fail": fail,
    "mistake": mistake,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "slow": lambda: time.sleep(5),
    "shared": lambda: None,
}


def main() -> None:
    trouble = sys.argv[1]
    world = ranks.init()
    try:
        with watched():
            for turn in range(40):
                if turn == 10 and world.rank == 1:
                    TROUBLES[trouble]()
                if turn == 20 and trouble == "shared":
                    ranks.run_on_all(mistake if world.rank == 1 else lambda: None)
                ranks.barrier()
    except SharedError as error:
        print(f"raised {error}", flush=True)
        sys.exit(2)
    print("all passed", flush=True)


if __name__ == "__main__":
    main()
