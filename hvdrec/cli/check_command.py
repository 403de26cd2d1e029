"""The command that checks samples before training: check."""

from __future__ import annotations

import argparse

from hvdrec.cli.command import ALL_FIELDS, CONFIG, Answer, argument, command, load_config
from hvdrec.cli.text_table import table

SHOWN_PERIODS = 14
"""Number of periods (days) in the table; --json lists all."""


@command(
    CONFIG,
    argument(
        "--against",
        default="",
        metavar="DIRECTORY",
        help="samples of another run, or its WORK, to measure drift against",
    ),
    notes="exit status: 1 if a check that checks.stop names has a finding, otherwise 0\n\n",
    example="hvdrec check configs/movielens-1m.toml --checks.stop leakage labels",
    fields=ALL_FIELDS,
)
def check(options: argparse.Namespace) -> Answer:
    """Check samples before training: nulls, label rates, unseen ids, leakage, drift."""
    from hvdrec.checks.check_run import check as check_samples

    result = check_samples(load_config(options), against=options.against)
    columns = [
        [
            c.name,
            c.side,
            f"{max(c.nulls.values(), default=0):.1%}",
            c.distinct,
            "" if c.low is None else f"{c.low:g} to {c.high:g}",
            f"{max(c.unseen.values()):.1%}" if c.unseen else "",
            *([] if not result.against else ["" if c.drift is None else f"{c.drift:.3f}"]),
        ]
        for c in result.columns
    ]
    headers = ["column", "side", "nulls", "values", "range", "unseen"]
    splits = [[s, n, f"{result.label_rate.get(s, 0):.2%}"] for s, n in result.rows.items()]
    lines = [
        table(["split", "rows", "label rate"], splits),
        "",
        table([*headers, *(["drift"] if result.against else [])], columns),
    ]
    if periods := result.periods[-SHOWN_PERIODS:]:
        rows = [[p.period, p.rows, f"{p.label_rate:.2%}"] for p in periods]
        lines += ["", table([f"last {len(rows)} periods", "rows", "label rate"], rows)]
    findings = [[f.status, f.check, f.what, f.split, f.text] for f in result.findings]
    if findings:
        lines += ["", table(["status", "check", "what", "split", "finding"], findings)]
    stops = sum(finding.status == "stop" for finding in result.findings)
    lines += ["", f"{len(findings)} findings, {stops} of them stop the run"]
    return Answer(result.to_dict(), "\n".join(lines), status=int(result.is_stopped))
