"""What a host reports about itself; neither torch nor Horovod is loaded.

``python -m hvdrec.cluster.probe PORT [PATH...]`` prints one JSON object. PORT is the port on which
the host that asks through ssh listens, or 0.
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


def probe_host(port: int, paths: Sequence[str]) -> dict[str, Any]:
    """Return this host's name, versions, clock, digests of paths, and failed connection."""
    client = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    return {
        "host": agreement.host_name(),
        "versions": agreement.versions(),
        "time": time.time(),
        "paths": {path: agreement.digest(Path(path)) for path in paths},
        "unreached": _connection_error(client, port) if port and client else "",
    }


def _connection_error(address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{address}: {error.strerror or error}"


if __name__ == "__main__":
    print(json.dumps(probe_host(int(sys.argv[1]), sys.argv[2:])))
