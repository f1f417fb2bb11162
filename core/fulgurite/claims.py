# SPDX-License-Identifier: Apache-2.0
"""A paper's claim as plain data, and the verdict on it from records of runs; imports neither torch nor Lightning.

Example:
    >>> claim = Claim(
    ...     statement="PS-KD lowers the negative log-likelihood.",
    ...     settings=(Setting("clean", {}, (Variant("baseline"), Variant("PSKD", add=("PSKD(alpha=0.8)",)))),),
    ...     seeds=8,
    ...     expectations=(Expectation("clean", "PSKD", "baseline", "test/nll", "lower", wins=7),),
    ... )
    >>> judge(claim, []).outcome
    'inconclusive'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fulgurite.errors import check_argument, nearest
from fulgurite.records import RunRecord, select
from fulgurite.statistics import Direction, PairedDifference, paired_difference, paired_values

Outcome = Literal["reproduced", "not reproduced", "inconclusive"]
Status = Literal["held", "refuted", "undecided"]


@dataclass(frozen=True)
class Variant:
    """One of the configurations that a setting compares.

    Args:
        name: The name in tables; the reference is usually called `"baseline"`.
        add: Components to add to the trainer, as text: `("PSKD(alpha=0.8)",)`.
        overrides: Dotted LightningCLI keys and their values: `{"model.label_smoothing": 0.1}`.

    Raises:
        ValueError: If `name` is empty or `add` is a bare string.
    """

    name: str
    add: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_argument(bool(self.name), "name", "Variant", "a name", self.name)
        check_argument(not isinstance(self.add, str), "add", "Variant", "a tuple of texts", self.add)


@dataclass(frozen=True)
class Summary:
    """A row that is made, seed by seed, from the runs of several variants, and stands beside them as one more.

    Args:
        name: The name in tables.
        of: Names of the variants, at least two.
        best: Metric that chooses the run whose metrics are taken: that of the best of a random search, by its validation
            loss. None takes the spread of every metric instead: the largest value minus the smallest.
        best_is: Which values of `best` are better.

    Raises:
        ValueError: If `name` is empty, or there are fewer than two distinct variants.
    """

    name: str
    of: tuple[str, ...]
    best: str | None = None
    best_is: Direction = "lower"

    def __post_init__(self) -> None:
        check_argument(bool(self.name), "name", "Summary", "a name", self.name)
        several = not isinstance(self.of, str) and len(set(self.of)) == len(self.of) >= 2
        check_argument(several, "of", "Summary", "two or more distinct names of variants", self.of)
        check_argument(self.best_is in get_args(Direction), "best_is", "Summary", "'lower' or 'higher'", self.best_is)

    def __call__(self, runs: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """Return the metrics of the row from those of the runs of one seed."""
        if self.best is None:
            shared = [name for name in runs[0] if all(name in run for run in runs)]
            return {name: max(run[name] for run in runs) - min(run[name] for run in runs) for name in shared}
        sign = 1.0 if self.best_is == "lower" else -1.0
        chosen = [run for run in runs if math.isfinite(run.get(self.best, math.nan))]
        return min(chosen, key=lambda run: sign * run[self.best or ""]) if chosen else {}


@dataclass(frozen=True)
class Setting:
    """Data and model on which variants are compared.

    Args:
        name: The name in tables and records.
        config: Nested LightningCLI configuration: `model`, `data`, `trainer`, `optimizer`, `lr_scheduler`.
        variants: What is compared, the reference included.
        summary: One line for the reader.
        summaries: Rows made from the runs of several variants.

    Raises:
        ValueError: If `name` is empty, `variants` are none, or they and the summaries do not have distinct names, or a
            summary is of variants that are none.
    """

    name: str
    config: Mapping[str, Any]
    variants: tuple[Variant, ...]
    summary: str = ""
    summaries: tuple[Summary, ...] = ()

    def __post_init__(self) -> None:
        check_argument(bool(self.name), "name", "Setting", "a name", self.name)
        variants = [variant.name for variant in self.variants]
        distinct = bool(variants) and len(set(self.rows)) == len(self.rows)
        check_argument(distinct, "variants", "Setting", "distinct names", self.rows)
        for summary in self.summaries:
            for name in summary.of:
                _check_known("of", name, variants, "Summary")

    @property
    def rows(self) -> list[str]:
        """The names of variants and summaries."""
        return [variant.name for variant in self.variants] + [summary.name for summary in self.summaries]


@dataclass(frozen=True)
class Expectation:
    """One comparison that the claim stands on.

    Args:
        setting: Name of the setting.
        variant: Name of the variant, or of the summary, that should be better.
        reference: Name of the variant that it is compared with; or a number, which all seeds are compared with.
        metric: Logged name of the final metric: `"test/nll"`.
        direction: Whether `variant` should be lower or higher.
        wins: Seeds, out of the claim's, in which it must be so; None asks for no count.
        description: The expectation in words.
        margin: By how much `variant` should be better at least; negative if it may be that much worse.

    Raises:
        ValueError: If `direction` is neither, a variant is compared with itself, or `margin` is not finite.
    """

    setting: str
    variant: str
    reference: str | float
    metric: str
    direction: Direction
    wins: int | None = None
    description: str = ""
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_argument(math.isfinite(self.margin), "margin", "Expectation", "a finite number", self.margin)
        check_argument(
            self.direction in get_args(Direction), "direction", "Expectation", "'lower' or 'higher'", self.direction
        )
        usable = self.variant != self.reference if isinstance(self.reference, str) else math.isfinite(self.reference)
        check_argument(usable, "reference", "Expectation", "another variant or a finite number", self.reference)

    def __str__(self) -> str:
        text = f"{self.setting}: {self.metric} of {self.variant} {self.direction} than {self._compared}"
        if self.margin > 0:
            text += f" by at least {self.margin:g}"
        elif self.margin < 0:
            text += f", or worse by at most {-self.margin:g}"
        return text if self.wins is None else f"{text}, in at least {self.wins} seeds"

    @property
    def _compared(self) -> str:
        return f"of {self.reference}" if isinstance(self.reference, str) else f"{self.reference:g}"


@dataclass(frozen=True)
class Claim:
    """What a paper claims, at a scale that can be run here.

    Args:
        statement: The claim in a sentence.
        settings: Where it is tested.
        seeds: Number of seeds of every variant, at least 2.
        expectations: What must hold for the claim to be reproduced, at least one.
        refuted_when: What would refute it, in words.
        findings: Honest side findings, in words.
        measures: Metrics of the table, by logged name; empty leaves the choice to the report.

    Raises:
        ValueError: If an expectation names what the settings do not have, or asks for more wins than there are seeds.
    """

    statement: str
    settings: tuple[Setting, ...]
    seeds: int
    expectations: tuple[Expectation, ...]
    refuted_when: str | None = None
    findings: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_argument(self.seeds >= 2, "seeds", "Claim", "at least 2", self.seeds)
        check_argument(bool(self.expectations), "expectations", "Claim", "at least one", self.expectations)
        for name in ("findings", "measures"):
            check_argument(
                not isinstance(getattr(self, name), str), name, "Claim", "a tuple of texts", getattr(self, name)
            )
        rows = {setting.name: setting.rows for setting in self.settings}
        check_argument(len(rows) == len(self.settings), "settings", "Claim", "distinct names", [*rows])
        for expected in self.expectations:
            _check_known("setting", expected.setting, rows)
            _check_known("variant", expected.variant, rows[expected.setting])
            if isinstance(expected.reference, str):
                _check_known("reference", expected.reference, rows[expected.setting])
            allowed = expected.wins is None or 1 <= expected.wins <= self.seeds
            check_argument(
                allowed, "wins", "Expectation", f"between 1 and the {self.seeds} seeds of the claim", expected.wins
            )


@dataclass(frozen=True)
class ExpectationResult:
    """How one expectation fared.

    Args:
        expectation: The expectation.
        status: `"held"`, `"refuted"` or `"undecided"`.
        difference: Variant minus reference (or number) over the seeds that both have; None if there are none.
        reason: Why, in words.
    """

    expectation: Expectation
    status: Status
    difference: PairedDifference | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim.

    Args:
        outcome: `"reproduced"`, `"not reproduced"` or `"inconclusive"`.
        results: One per expectation, in the order of the claim.
        reason: Why, in words.
    """

    outcome: Outcome
    results: tuple[ExpectationResult, ...]
    reason: str


def summarised(settings: Iterable[Setting], records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the records with those that the settings' summaries make of them, for seeds whose runs all succeeded."""
    settings = list(settings)
    made = {(setting.name, summary.name) for setting in settings for summary in setting.summaries}
    runs = [record for record in records if (record.setting, record.variant) not in made]
    rows = []
    for setting in settings:
        for summary in setting.summaries:
            found = [select(runs, setting.name, name) for name in summary.of]
            for seed in sorted(set[int].intersection(*(set(by_seed) for by_seed in found))):
                metrics = summary([by_seed[seed].metrics for by_seed in found])
                rows.append(RunRecord(setting.name, summary.name, seed, "ok", metrics=metrics))
    return runs + rows


def judge(claim: Claim, records: Iterable[RunRecord]) -> Verdict:
    """Compare the records with the claim, its summaries included.

    An expectation *holds* if the mean paired difference has the claimed sign, its 95 % interval excludes zero, and the
    required wins are there. It is *refuted* if the mean difference does not have the claimed sign (an interval that
    excludes zero on the wrong side is a case of it). Else it is *undecided*; so it is with fewer than two pairs, with
    fewer pairs than required wins, and with values that are not finite. More seeds than the claim has ask for the same
    share of wins.

    The claim is reproduced if all expectations hold on all of its seeds, not reproduced if any is refuted, else
    inconclusive.
    """
    records = summarised(claim.settings, records)
    results = tuple(_judge_one(expected, claim.seeds, records) for expected in claim.expectations)
    total = len(results)
    refuted = sum(result.status == "refuted" for result in results)
    if refuted:
        return Verdict("not reproduced", results, f"{refuted} of {total} expectations {_is(refuted)} refuted.")
    held = sum(result.status == "held" for result in results)
    if held < total:
        return Verdict(
            "inconclusive", results, f"{total - held} of {total} expectations {_is(total - held)} undecided."
        )
    pairs = min(result.difference.n if result.difference else 0 for result in results)
    if pairs < claim.seeds:
        reason = f"All expectations hold, but only on {pairs} of {claim.seeds} seeds: runs are missing or failed."
        return Verdict("inconclusive", results, reason)
    return Verdict("reproduced", results, f"{'All' if total > 1 else 'The'} {_count(total)} hold{'s' * (total == 1)}.")


def _judge_one(expected: Expectation, seeds: int, records: Sequence[RunRecord]) -> ExpectationResult:
    pairs = _pairs(records, expected)
    if not pairs:
        whose = expected.variant
        if isinstance(expected.reference, str):
            whose = f"both {whose} and {expected.reference}"
        reason = f"No seed has {expected.metric} of {whose}."
        return ExpectationResult(expected, "undecided", None, reason)
    ours, theirs = zip(*pairs.values(), strict=True)
    difference = paired_difference(ours, theirs, better=expected.direction)
    margin = expected.margin if expected.direction == "higher" else -expected.margin
    asked = paired_difference(ours, [value + margin for value in theirs], better=expected.direction)
    status, reason = _decide(asked, expected, seeds)
    unfinished = [seed for seed, values in pairs.items() if not all(map(math.isfinite, values))]
    if unfinished:
        status, reason = "undecided", f"Not finite for seed {', '.join(map(str, unfinished))}."
    return ExpectationResult(expected, status, difference, reason)


def _pairs(records: Sequence[RunRecord], expected: Expectation) -> dict[int, tuple[float, float]]:
    """Return, by seed, the variant's value and what it is compared with."""
    if isinstance(expected.reference, str):
        return paired_values(records, expected.setting, expected.variant, expected.reference, expected.metric)
    runs = select(records, expected.setting, expected.variant)
    return {
        seed: (runs[seed].metrics[expected.metric], expected.reference)
        for seed in sorted(runs)
        if expected.metric in runs[seed].metrics
    }


def _decide(difference: PairedDifference, expected: Expectation, seeds: int) -> tuple[Status, str]:
    required = expected.wins or 0
    than = f"{expected.direction} than the margin allows" if expected.margin < 0 else expected.direction
    won = f"{than}{' by the margin' if expected.margin > 0 else ''} in {difference.wins} of {difference.n} seeds"
    if difference.n < max(2, required):
        return "undecided", f"Only {difference.n} of {seeds} seeds; at least {max(2, required)} are needed."
    required = math.ceil(required * max(difference.n, seeds) / seeds)
    on_claimed_side = difference.mean < 0 if expected.direction == "lower" else difference.mean > 0
    if not on_claimed_side:
        return "refuted", f"The mean is not {than} ({won})."
    if not difference.excludes_zero:
        return "undecided", f"The interval contains zero ({won})."
    if difference.wins < required:
        return "undecided", f"{won.capitalize()}; {required} are required."
    return "held", f"{won.capitalize()}."


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _count(number: int) -> str:
    return "expectation" if number == 1 else f"{number} expectations"


def _check_known(what: str, name: str, known: Iterable[str], owner: str = "Expectation") -> None:
    known = list(known)
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(f"Expected `{what}` of {owner} to be one of {', '.join(known)}, but got {name!r}.{hint}")
