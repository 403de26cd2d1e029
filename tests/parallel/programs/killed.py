"""Write an artifact by tasks, one of which kills the rank that does it, if it is not the first."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hvdrec.parallel import rank_pool as workers
from hvdrec.parallel.rank_pool import open_workers
from hvdrec.storage.artifacts import write_artifact


def task(number: int) -> int:
    if number >= 4 and not workers.is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def main() -> None:
    with open_workers(0) as found:
        if found is None:
            return
        with write_artifact(Path(sys.argv[1]), "features") as draft:
            for number in found.map(task, range(40)):
                (draft / f"{number}.txt").write_text("done")


if __name__ == "__main__":
    main()
