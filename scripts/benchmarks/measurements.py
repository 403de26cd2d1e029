"""The programs of a turn and the ratios of their figures."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"
ENVIRONMENTS: dict[str, dict[str, Any]] = tomllib.loads((PEERS / "environments.toml").read_text())
FUSED = ("fuxictr", "deepctr", "rechub")
"""Peers that are also measured with a fused Adam, which their documents do not mention."""
BIN = Path(sys.executable).parent
SPEED, MEMORY, WAIT = "samples_per_second", "peak_memory_mb", "reader_wait"

ONLY = {
    "work_a": "8 tables of 1,000,000 ids, width 16, MLP 400-400-400, batch 4096, fp32",
    "work_a_bf16": "the same with bf16 autocast",
    "mlp": "the step of work (a) against its MLP alone, on ready-made vectors",
    "bf16_ratio": "hvdrec's bf16 against its fp32, MLP 1024-512-256",
    "work_b": "MovieLens-1M's ranking model, readers included",
    "vocabulary": "a step with 10,000,000 ids a table against one with 10,000",
    "two_ranks": "two ranks with sharded tables, one thread each: under mpirun, and with Gloo",
    "memory": "8 tables of 10,000,000 rows: a rank of two against one rank",
}


@dataclass(frozen=True)
class Program:
    """A program to measure; `peer` is empty for hvdrec, `data` names a folder of the work."""

    data: str
    arguments: tuple[str, ...] = ()
    peer: str = ""
    launcher: tuple[str, ...] = ()
    copies: int = 1
    """Processes at the same time, which do not know of each other; their speeds are added."""
    processes: int = 1
    """That share the machine: each gets one thread if there are several, else all."""


@dataclass(frozen=True)
class Ratio:
    """A figure of `above` divided by that of `below`, or the figure itself."""

    only: str
    key: str
    above: str
    below: str = ""
    figure: str = SPEED


def programs() -> dict[str, Program]:
    """Return all programs by name, in the order of a turn; compared programs are neighbours."""
    horovodrun = (str(BIN / "horovodrun"), "-np", "2", "--gloo", "--network-interfaces", "lo")
    mpirun = (str(BIN / "mpirun"), "-np", "2", "--bind-to", "none", "--oversubscribe")
    mpirun += ("--allow-run-as-root",)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two, bf16 = ("--threads", "1"), ("--precision", "bf16")
    sharded = (*two, "--placement", "sharded")
    wide = ("--hidden", "1024,512,256")
    few_steps = ("--steps", "8", "--warmup", "2")
    a, b = ("--work", "a"), ("--work", "b")
    made = {
        "mlp.fp32": Program("", ("--only-mlp",)),
        "mlp.fp32_own_layers": Program("", ("--only-mlp", "--own-layers")),
        "work_a.hvdrec": Program("work_a", a),
        "work_a.torchrec": Program("work_a", a, "torchrec"),
        "work_a_bf16.torchrec": Program("work_a", (*a, *bf16), "torchrec"),
        "work_a_bf16.hvdrec": Program("work_a", (*a, *bf16)),
        "mlp.bf16": Program("", ("--only-mlp", *bf16)),
    }
    made |= {f"work_a.{p}": Program("work_a", a, p) for p in ENVIRONMENTS}
    fused = (*a, "--adam", "fused")
    made |= {f"work_a.{p}_fused": Program("work_a", fused, p) for p in FUSED}
    made |= {
        "wide.fp32": Program("work_a", (*a, *wide)),
        "wide.bf16": Program("work_a", (*a, *wide, *bf16)),
        "work_b.hvdrec": Program("work_b", b),
    }
    made |= {f"work_b.{p}": Program("work_b", b, p) for p in ENVIRONMENTS}
    return made | {
        "vocabulary.few": Program("few", a),
        "vocabulary.many": Program("many", a),
        "two_ranks.hvdrec": Program("work_a", (*a, *sharded), "", mpirun, processes=2),
        "two_ranks.gloo": Program("work_a", (*a, *sharded), "", horovodrun, processes=2),
        "two_ranks.alone": Program("work_a", (*a, *two, "--batch", "2048"), copies=2, processes=2),
        "two_ranks.hvdrec_4096": Program(
            "work_a", (*a, *sharded, "--batch", "8192"), "", mpirun, processes=2
        ),
        "two_ranks.alone_4096": Program(
            "work_a", (*a, *two, "--batch", "4096"), copies=2, processes=2
        ),
        "two_ranks.torchrec": Program(
            "work_a", (*a, *two, "--distributed"), "torchrec", torchrun, processes=2
        ),
        "memory.one_rank": Program("many", (*a, *few_steps)),
        "memory.two_ranks": Program(
            "many", (*a, *few_steps, *sharded), "", horovodrun, processes=2
        ),
    }


def ratios() -> list[Ratio]:
    """Return the ratios to report; dots in a key separate levels of the JSON object."""
    ours, ours_bf16 = "work_a.hvdrec", "work_a_bf16.hvdrec"
    peers = (*ENVIRONMENTS, *(f"{peer}_fused" for peer in FUSED))
    a = [Ratio("work_a", f"work_a.ratio.{p}", ours, f"work_a.{p}") for p in peers]
    b = [Ratio("work_b", f"work_b.ratio.{p}", "work_b.hvdrec", f"work_b.{p}") for p in ENVIRONMENTS]
    return [
        *a,
        Ratio("work_a", "work_a.reader_wait", ours, figure=WAIT),
        Ratio("work_a_bf16", "work_a.bf16.ratio.torchrec", ours_bf16, "work_a_bf16.torchrec"),
        Ratio("work_a_bf16", "work_a.bf16_over_fp32_of_torchrec", ours_bf16, "work_a.torchrec"),
        Ratio("work_a_bf16", "work_a.bf16.reader_wait", ours_bf16, figure=WAIT),
        Ratio("mlp", "work_a.share_of_mlp", ours, "mlp.fp32"),
        Ratio("mlp", "work_a.share_of_mlp_own_layers", ours, "mlp.fp32_own_layers"),
        Ratio("mlp", "work_a.bf16.share_of_mlp", ours_bf16, "mlp.bf16"),
        Ratio("bf16_ratio", "work_a.bf16_ratio", "wide.bf16", "wide.fp32"),
        *b,
        # Of times, so the speeds stand the other way round.
        Ratio("vocabulary", "vocabulary_ratio", "vocabulary.few", "vocabulary.many"),
        Ratio("two_ranks", "two_ranks.share", "two_ranks.hvdrec", "two_ranks.alone"),
        # The same with 4,096 rows a rank, not of both together.
        Ratio(
            "two_ranks",
            "two_ranks.share_4096_each",
            "two_ranks.hvdrec_4096",
            "two_ranks.alone_4096",
        ),
        Ratio("two_ranks", "two_ranks.gloo.share", "two_ranks.gloo", "two_ranks.alone"),
        Ratio("two_ranks", "two_ranks.ratio.torchrec", "two_ranks.hvdrec", "two_ranks.torchrec"),
        Ratio("memory", "memory_share", "memory.two_ranks", "memory.one_rank", MEMORY),
    ]
