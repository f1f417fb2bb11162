# SPDX-License-Identifier: Apache-2.0
"""What interventions support, in a table: each line stands for checks, and says what they found."""

from __future__ import annotations

from collections.abc import Sequence

from fulgurite.testing.check import REFUSED, Result

ROWS: dict[str, tuple[str, ...]] = {
    "several devices (DDP)": ("two_ranks_equal_one", "uneven_shards", "state_is_equal_on_all_ranks"),
    "sharded parameters (FSDP2)": ("sharded_parameters",),
    "bf16-mixed": ("bf16",),
    "16-mixed": ("fp16_loss_scale", "fp16_skipped_step"),
    "torch.compile": ("compile",),
    "gradient accumulation": ("accumulation", "short_last_window"),
    "gradient clipping": ("gradient_clipping",),
    "manual optimization": ("manual_optimization",),
    "weight averaging (EMA)": ("weight_averaging",),
    "resume at an epoch's end": ("resume_at_epoch_end", "resume_when_restored_late"),
    "resume in mid-epoch": ("resume_in_mid_epoch", "resume_with_accumulation"),
    "iterable data": ("iterable_data",),
    "several loaders at once": ("combined_loader",),
    "batches that are dicts": ("dict_batches",),
    "no wait for the device": ("no_synchronisation",),
}
"""The lines of the table, and the checks that each stands for."""


def support(plugin: str, results: Sequence[Result]) -> str | None:
    """Return the Markdown of one plugin's table, a column per case of an intervention; None if it has no interventions.

    Args:
        plugin: The plugin's slug.
        results: What all checks of its components found.
    """
    columns: dict[str, dict[str, Result]] = {}
    for result in results:
        columns.setdefault(result.subject, {})[result.check] = result
    columns = {name: found for name, found in columns.items() if "accumulation" in found}
    if not columns:
        return None
    lines = [f"| | {' | '.join(f'`{name}`' for name in columns)} |", f"|---|{':-:|' * len(columns)}"]
    notes: dict[str, list[str]] = {}
    for row, checks in ROWS.items():
        cells = []
        for name, found in columns.items():
            cell, why = _cell([found[check] for check in checks if check in found])
            cells.append(cell)
            if why:
                notes.setdefault(f"{row}: {why}", []).append(f"`{name}`")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    reasons = [f"- {', '.join(names)}, {note}" for note, names in notes.items()]
    parts = [
        f"<!-- Written by `fulgurite check {plugin} --support`; not to be edited. -->\n\n## Support",
        f"What `fulgurite check {plugin}` found. *refused*: training does not start, and the message says why; –: not "  # noqa: RUF001
        "applicable; *fails*: do not use it so.",
        "\n".join(lines),
        *(["\n".join(reasons)] if reasons else []),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(found: Sequence[Result]) -> tuple[str, str]:
    """Return what a cell says, and why, if that is not plain."""
    for word, matches in (
        ("fails", [result for result in found if result.status == "fail"]),
        ("refused", [result for result in found if REFUSED in result.reason]),
    ):
        if matches:
            return word, matches[0].reason.removeprefix(f"{REFUSED}: ")
    excused = [result for result in found if result.status == "inapplicable"]
    passed = any(result.status == "pass" for result in found)
    return "✓" if passed else "–", f"{excused[0].check} is not applicable: {excused[0].reason}" if excused else ""  # noqa: RUF001
