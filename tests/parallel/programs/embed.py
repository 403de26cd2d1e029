"""Embed the users of a trained run in small blocks, on any number of ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq

from hvdrec.config import load_config
from hvdrec.exporting import embed
from hvdrec.parallel.pool import open_pool


def main() -> None:
    config, bundle, out = load_config(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    with open_pool(int(sys.argv[4])) as workers:
        if workers is None:
            return
        out.mkdir()
        shutil.copy(bundle / "user_tower.onnx", out)
        embed.BLOCK = 7
        users = pq.read_table(config.paths.of("samples") / "users_all.parquet")
        assert embed.write_side(out, "user", users, config.schema, workers) == users.num_rows
        print(f"{workers.helpers} helpers", flush=True)


if __name__ == "__main__":
    main()
