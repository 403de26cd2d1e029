"""Write an artifact with tasks, one of which kills its rank unless that is rank 0."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hvdrec.parallel.pool import is_first_rank, open_pool
from hvdrec.storage.artifacts import write_artifact


def task(number: int) -> int:
    if number >= 4 and not is_first_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def main() -> None:
    with open_pool(0) as workers:
        if workers is None:
            return
        with write_artifact(Path(sys.argv[1]), "features") as draft:
            for number in workers.map(task, range(40)):
                (draft / f"{number}.txt").write_text("done")


if __name__ == "__main__":
    main()
