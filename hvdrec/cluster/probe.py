"""What a host answers when it is asked whether it is fit for a job; neither torch nor Horovod load.

``python -m hvdrec.cluster.probe PORT [PATH...]`` prints one JSON object. PORT is where the host
that asks through ssh listens, 0 if nobody does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdrec.parallel import agreement

CONNECT_SECONDS = 5.0


def answer(port: int, paths: Sequence[str]) -> dict[str, Any]:
    """Return this host's name, versions, clock, what it sees at paths, and whom it cannot reach."""
    asker = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    return {
        "host": agreement.host_name(),
        "versions": agreement.versions(),
        "time": time.time(),
        "paths": {path: agreement.digest(Path(path)) for path in paths},
        "unreached": _unreached(asker, port) if port and asker else "",
    }


def _unreached(address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{address}: {error.strerror or error}"


if __name__ == "__main__":
    print(json.dumps(answer(int(sys.argv[1]), sys.argv[2:])))
