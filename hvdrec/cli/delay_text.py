"""Format a report about delays as text."""

from __future__ import annotations

from hvdrec.cli.text_table import table
from hvdrec.samples.delay import ActionDelays, DelayResult
from hvdrec.samples.delay_html import interval_text

BAR = 24
"""Characters of a bar that stands for all positives."""


def render_delays(result: DelayResult) -> str:
    """Format the delays of each action: the recommended window, and a table of windows."""
    return "\n\n".join(_action(action) for action in result.actions)


def _action(action: ActionDelays) -> str:
    lines = [
        f"{action.name}: {action.positives} of {action.exposures} exposures have feedback within "
        f"{action.within}"
    ]
    if action.seconds is not None:
        heads = ["window", "caught", "", "95 %", "missed", "wrong 0", "unsettled"]
        rows = [
            [
                choice.window + ("  *" if choice.window == action.recommended else ""),
                f"{choice.caught:.1%}",
                "#" * round(choice.caught * BAR),
                f"{choice.low:.1%} to {choice.high:.1%}",
                f"{choice.missed:.1%}",
                f"{choice.wrong_negatives:.2%}",
                f"{choice.unsettled:.1%}",
            ]
            for choice in action.choices
        ]
        lines += [
            table(heads, rows),
            "caught, missed: share of the positives labelled 1 and 0; wrong 0: share of the rows "
            "labelled 0 that are positives; unsettled: share of the exposures that wait for the "
            "next run",
            f"* the smallest window that catches {action.share:.0%}: "
            f'window = "{action.recommended}" ({interval_text(action)}); '
            f"configured: {action.configured}",
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in action.notes)])
