# SPDX-License-Identifier: Apache-2.0
"""Claims are validated, and the verdict follows the published rule at every border."""

import math
import subprocess
import sys

import pytest

from fulgurite.claims import Claim, Expectation, Setting, Summary, Variant, judge, summarised
from fulgurite.records import RunRecord

VARIANTS = (Variant("baseline"), Variant("new", add=("PSKD(alpha=0.8)",)), Variant("smooth"))


def claim(*expectations: Expectation, seeds: int = 4) -> Claim:
    settings = (Setting("clean", {}, VARIANTS), Setting("noisy", {}, VARIANTS))
    return Claim("New is better.", settings, seeds, expectations)


def expect(direction: str = "lower", wins: int | None = None, setting: str = "clean") -> Expectation:
    return Expectation(setting, "new", "baseline", "test/nll", direction, wins)


def runs(differences: list[float | None], setting: str = "clean") -> list[RunRecord]:
    """Baseline at 1 in every seed, `new` at 1 + difference; None is a failed run."""
    records = [
        RunRecord(setting, "baseline", seed, "ok", metrics={"test/nll": 1.0}) for seed in range(len(differences))
    ]
    for seed, difference in enumerate(differences):
        if difference is None:
            records.append(RunRecord(setting, "new", seed, "failed", error="RuntimeError"))
        else:
            records.append(RunRecord(setting, "new", seed, "ok", metrics={"test/nll": 1.0 + difference}))
    return records


CLEAR = [-0.10, -0.11, -0.09, -0.10]


def test_reproduced():
    verdict = judge(claim(expect(wins=4)), runs(CLEAR))
    assert (verdict.outcome, verdict.results[0].status) == ("reproduced", "held")
    assert verdict.results[0].difference.mean == pytest.approx(-0.10)
    assert verdict.results[0].difference.wins == 4


def test_higher_is_judged_by_the_other_sign():
    assert judge(claim(expect("higher", 4)), runs([-d for d in CLEAR])).outcome == "reproduced"
    assert judge(claim(expect("higher", 4)), runs(CLEAR)).outcome == "not reproduced"


@pytest.mark.parametrize("differences", [[-d for d in CLEAR], [0.3, -0.1, 0.1, -0.2], [0.0] * 4])
def test_a_mean_not_on_the_claimed_side_refutes(differences):
    """Clearly wrong, unclear but on the wrong side, and exactly equal."""
    verdict = judge(claim(expect()), runs(differences))
    assert (verdict.outcome, verdict.results[0].status) == ("not reproduced", "refuted")


def test_right_sign_with_an_interval_over_zero_is_undecided():
    verdict = judge(claim(expect()), runs([-0.3, 0.1, -0.2, 0.1]))
    assert (verdict.outcome, verdict.results[0].status) == ("inconclusive", "undecided")
    assert "contains zero" in verdict.results[0].reason


def test_too_few_wins_are_undecided():
    differences = [-0.2, -0.2, -0.2, -0.2, -0.2, -0.2, 0.01, 0.01]
    assert judge(claim(expect(), seeds=8), runs(differences)).outcome == "reproduced"
    verdict = judge(claim(expect(wins=7), seeds=8), runs(differences))
    assert (verdict.outcome, verdict.results[0].reason) == ("inconclusive", "Lower in 6 of 8 seeds; 7 are required.")


def test_required_wins_are_not_scaled_down_to_fewer_seeds():
    verdict = judge(claim(expect(wins=7), seeds=8), runs(CLEAR))
    assert (verdict.outcome, verdict.results[0].status) == ("inconclusive", "undecided")
    assert "Only 4 of 8 seeds" in verdict.results[0].reason


def test_more_seeds_than_claimed_ask_for_the_same_share_of_wins():
    """Otherwise 7 wins of 20 seeds would satisfy a claim of 7 in 8."""
    differences = [-0.5] * 15 + [0.01] * 5
    verdict = judge(claim(expect(wins=7), seeds=8), runs(differences))
    assert (verdict.outcome, verdict.results[0].reason) == ("inconclusive", "Lower in 15 of 20 seeds; 18 are required.")


def test_missing_and_failed_runs_leave_it_open():
    for records in (runs([*CLEAR[:3], None]), runs(CLEAR)[:-1]):
        verdict = judge(claim(expect(wins=3)), records)
        assert (verdict.outcome, verdict.results[0].status) == ("inconclusive", "held")
        assert "3 of 4 seeds" in verdict.reason
    assert judge(claim(expect()), []).results[0].difference is None
    assert judge(claim(expect()), []).outcome == "inconclusive"


def test_a_single_pair_decides_nothing():
    for value in (-0.5, 0.5):
        assert judge(claim(expect()), runs([value])).results[0].status == "undecided"


def test_a_diverged_run_decides_nothing():
    verdict = judge(claim(expect()), runs([*CLEAR[:3], math.inf]))
    assert (verdict.results[0].status, verdict.results[0].reason) == ("undecided", "Not finite for seed 3.")


def test_one_refuted_expectation_outweighs_the_others():
    both = claim(expect(), expect(setting="noisy"))
    good, bad = runs(CLEAR), runs([-d for d in CLEAR], "noisy")
    assert judge(both, good + runs(CLEAR, "noisy")).outcome == "reproduced"
    assert judge(both, good + bad).outcome == "not reproduced"
    verdict = judge(both, good)
    assert (verdict.outcome, [r.status for r in verdict.results]) == ("inconclusive", ["held", "undecided"])


def test_a_margin_moves_the_line():
    """By at least so much better, or by at most so much worse; the published difference stays what it is."""
    at_least = Expectation("clean", "new", "baseline", "test/nll", "lower", margin=0.05)
    more = Expectation("clean", "new", "baseline", "test/nll", "lower", margin=0.2)
    (result,) = judge(claim(at_least), runs(CLEAR)).results
    assert result.status == "held"
    assert result.difference is not None
    assert result.difference.mean == pytest.approx(-0.1)
    assert [r.status for r in judge(claim(more), runs(CLEAR)).results] == ["refuted"]
    worse = [-d for d in CLEAR]
    allowed = Expectation("clean", "new", "baseline", "test/nll", "lower", margin=-0.2)
    higher = Expectation("clean", "new", "baseline", "test/nll", "higher", margin=0.2)
    assert judge(claim(allowed), runs(worse)).outcome == "reproduced"
    assert judge(claim(higher), runs(worse)).outcome == "not reproduced"
    assert str(at_least).endswith("lower than of baseline by at least 0.05")
    assert str(allowed).endswith("lower than of baseline, or worse by at most 0.2")
    with pytest.raises(ValueError, match="`margin` of Expectation"):
        Expectation("clean", "new", "baseline", "test/nll", "lower", margin=math.nan)


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"`setting`.*'clear'\. Did you mean 'clean'"):
        claim(expect(setting="clear"))
    with pytest.raises(ValueError, match=r"`variant`.*'smoth'\. Did you mean 'smooth'"):
        claim(Expectation("clean", "smoth", "baseline", "test/nll", "lower"))
    with pytest.raises(ValueError, match=r"`reference`.*'base'"):
        claim(Expectation("clean", "new", "base", "test/nll", "lower"))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 4 seeds"):
        claim(expect(wins=5))
    with pytest.raises(ValueError, match="at least 2, but got 1"):
        claim(expect(), seeds=1)
    with pytest.raises(ValueError, match="at least one"):
        claim()
    with pytest.raises(ValueError, match="'lower' or 'higher', but got 'less'"):
        expect("less")
    with pytest.raises(ValueError, match="another variant"):
        Expectation("clean", "new", "new", "test/nll", "lower")
    with pytest.raises(ValueError, match="distinct names"):
        Setting("clean", {}, (Variant("a"), Variant("a")))
    with pytest.raises(ValueError, match=r"tuple of texts, but got 'PSKD'"):
        Variant("new", add="PSKD")


def test_importing_claims_imports_nothing_heavy():
    """`fulgurite reproduce --list` reads claims; it must not pay for torch, Lightning or scipy."""
    code = (
        "import sys, fulgurite.claims; print([m for m in ('torch', 'lightning', 'scipy', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_number_is_a_line_that_all_seeds_are_compared_with():
    """`PerpGrad reaches 0.95` is no comparison of two variants."""
    below = Expectation("clean", "new", 0.95, "test/nll", "lower", wins=4)
    (result,) = judge(claim(below), runs(CLEAR)).results
    assert (result.status, str(below)) == ("held", "clean: test/nll of new lower than 0.95, in at least 4 seeds")
    assert result.difference is not None
    assert result.difference.mean == pytest.approx(-0.05)
    assert judge(claim(Expectation("clean", "new", 0.85, "test/nll", "lower")), runs(CLEAR)).outcome == "not reproduced"
    assert judge(claim(below), []).results[0].reason == "No seed has test/nll of new."
    with pytest.raises(ValueError, match="another variant or a finite number"):
        Expectation("clean", "new", math.nan, "test/nll", "lower")


def searched(values: list[tuple[float, float]], **options: str) -> tuple[Claim, list[RunRecord]]:
    """A search over two variants, by (validation, test) loss, in each of two seeds."""
    variants = (Variant("baseline"), Variant("a"), Variant("b"))
    setting = Setting("clean", {}, variants, summaries=(Summary("search", of=("a", "b"), **options),))
    expectation = Expectation("clean", "baseline", "search", "test/nll", "lower")
    records = [
        RunRecord("clean", name, seed, "ok", metrics={"val/nll": val, "test/nll": test})
        for seed in range(2)
        for name, (val, test) in zip("ab", values, strict=True)
    ]
    return Claim("Search.", (setting,), 2, (expectation,)), records


def test_a_summary_takes_the_run_that_validation_chooses_not_the_best_of_the_test():
    claimed, records = searched([(0.2, 0.9), (0.3, 0.1)], best="val/nll")
    rows = [r for r in summarised(claimed.settings, records) if r.variant == "search"]
    assert [r.metrics["test/nll"] for r in rows] == [0.9, 0.9]
    claimed, records = searched([(0.2, 0.9), (0.3, 0.1)], best="val/nll", best_is="higher")
    assert summarised(claimed.settings, records)[-1].metrics["test/nll"] == 0.1
    claimed, records = searched([(math.nan, 0.9), (0.3, 0.1)], best="val/nll")
    assert summarised(claimed.settings, records)[-1].metrics["test/nll"] == 0.1  # a diverged run is never the best


def test_a_summary_takes_the_spread_and_stands_among_the_variants():
    claimed, records = searched([(0.2, 0.9), (0.3, 0.1)])
    twice = summarised(claimed.settings, summarised(claimed.settings, records))
    assert [r.metrics["test/nll"] for r in twice if r.variant == "search"] == pytest.approx([0.8, 0.8])
    baseline = [RunRecord("clean", "baseline", s, "ok", metrics={"test/nll": 0.5 + s / 100}) for s in range(2)]
    assert judge(claimed, records + baseline).results[0].status == "held"
    assert len(summarised(claimed.settings, records[:-1])) == 4  # no row for a seed whose runs are not all there


def test_a_summary_of_unknown_variants_is_named():
    with pytest.raises(ValueError, match="Expected `of` of Summary to be one of baseline, but got 'bas'"):
        Setting("clean", {}, (Variant("baseline"),), summaries=(Summary("s", of=("baseline", "bas")),))
    with pytest.raises(ValueError, match="two or more distinct names"):
        Summary("s", of=("a",))
