"""The probe, which reports the state of a host before a launch, without torch or Horovod.

``python -m hvdrec.cluster.probe PORT [PATH...]`` prints one JSON object. The probe tries to connect
to PORT of the host that called it by ssh; PORT 0 skips this.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdrec.parallel import agreement
from hvdrec.storage.json_text import json_text

CONNECT_SECONDS = 5.0


def probe_host(port: int, paths: Sequence[str]) -> dict[str, Any]:
    """Return this host's report, ready for JSON.

    Returns:
        ``host``: name; ``versions``: of Python and packages; ``time``: seconds since the epoch;
        ``paths``: a digest of each path; ``unreached``: the reason why this host cannot connect to
        `port` of the host that called it by ssh; empty if it can.
    """
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
    print(json_text(probe_host(int(sys.argv[1]), sys.argv[2:])))
