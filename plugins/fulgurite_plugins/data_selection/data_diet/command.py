# SPDX-License-Identifier: Apache-2.0
"""`fulgurite score`: scores of all training examples, averaged over several initialisations, and a report on them."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulgurite.claims import Setting, Variant
from fulgurite.environment import refuse_if_set
from fulgurite.errors import FulguriteError

if TYPE_CHECKING:
    from rich.console import Console

    from fulgurite.records import RunRecord
    from fulgurite_plugins.data_selection.data_diet.files import Scores

_HERE = __package__
_EXAMPLE = "the embedded example: 1200 handwritten digits, a fifth of the training labels wrong"
_NAMES = ("el2n", "grand", "l1", "max_margin", "sum_margin", "error", "forgetting")


def run(argv: list[str]) -> int:
    """Score, average and report; return the exit status."""
    arguments = _parser().parse_args(argv)
    out = arguments.out.absolute()
    if arguments.average:
        return _average(arguments.average, out, arguments.never_learned)
    refuse_if_set()
    from rich.console import Console

    console = Console()
    config = _read(arguments.config)
    parts = _score(console, config, arguments, out)
    from fulgurite_plugins.data_selection.data_diet.files import average, save_scores

    scores = average(parts, arguments.never_learned)
    save_scores(out, scores)
    records = _sweep(console, config, arguments, out, scores) if arguments.keep else []
    from fulgurite_plugins.data_selection.data_diet.report import write_report
    from fulgurite_plugins.data_selection.data_diet.summary import printed

    facts = {
        "command": shlex.join(["fulgurite", "score", *argv]),
        "configuration": str(arguments.config or _EXAMPLE),
        **{name: str(scores.provenance.get(name)) for name in ("fulgurite", "torch")},
    }
    page = out.with_suffix(".html")
    console.print(printed(write_report(page, config, scores, parts, records, facts)))
    for path in (out, page):
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fulgurite score",
        description="Train your configuration from several seeds, score every training example a few epochs into training, "
        "and write the mean of the scores and a report: how far runs agree, how the scores rank beside each other, and how "
        "well they find wrong labels, where the datamodule knows them. Prune with it: PruneTrainingSet(source=FILE). After "
        "an interruption the same command goes on.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="what `fulgurite fit` takes; by default an example")
    parser.add_argument("--runs", type=_positive, default=10, metavar="R", help="initialisations (default: 10)")
    parser.add_argument(
        "--epochs", type=float, nargs="+", default=[10.0], metavar="E", help="after how many epochs (default: 10)"
    )
    parser.add_argument("--scores", nargs="+", default=["el2n"], choices=_NAMES, help="which scores (default: el2n)")
    parser.add_argument(
        "--keep", type=float, nargs="+", metavar="F", help="also train on these fractions, by each score and at random"
    )
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="seeds of these trainings (default: 3)")
    parser.add_argument("--dataset", metavar="NAME", help="attribute of the datamodule: the data without augmentation")
    parser.add_argument("--parameters", default="all", help="of GraNd: all, last_layer, or a pattern of names")
    parser.add_argument(
        "--never-learned", choices=("inf", "max"), default="inf", help="what an example counts that a run never learned"
    )
    parser.add_argument("--average", type=Path, nargs="+", metavar="FILE", help="train nothing, average these files")
    parser.add_argument(
        "--jobs", type=_positive, metavar="J", help="runs at the same time (default: one per core or GPU)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("scores.safetensors"), metavar="FILE", help="the file of scores"
    )
    return parser


def _score(console: Console, config: Mapping[str, Any], arguments: argparse.Namespace, out: Path) -> list[Scores]:
    """Return the scores of every run."""
    from fulgurite_plugins.data_selection.data_diet.files import Scores, load_scores

    place = out.with_suffix("")
    folder = place / "runs"
    epochs = sorted(set(arguments.epochs))
    passes = tuple(name for name in arguments.scores if name != "forgetting")
    forgetting = "forgetting" in arguments.scores
    if forgetting and any(epoch < 1 or epoch != int(epoch) for epoch in epochs):
        raise FulguriteError(f"Expected --epochs of whole numbers for forgetting events, but got {epochs}.")
    # EL2N is nearly free, and its last scoring ends the training.
    add = [
        f"{_HERE}.callbacks.ScoreExamples(scores={passes or ('el2n',)!r}, epochs={tuple(epochs)!r}, "
        f"dataset={arguments.dataset!r}, parameters={arguments.parameters!r}, directory={str(folder)!r}, stop=True)"
    ]
    if forgetting:
        counted = tuple(int(epoch) for epoch in epochs)
        add.insert(0, f"{_HERE}.forgetting.ForgettingEvents(epochs={counted!r}, directory={str(folder)!r})")
    setting = Setting("main", config, (Variant("scoring", add=tuple(add)),))
    _execute(console, [setting], range(arguments.runs), arguments.jobs, place)
    parts = []
    for seed in range(arguments.runs):
        files = [folder / f"seed={seed}-epoch={epoch:g}.safetensors" for epoch in epochs] if passes else []
        files += (
            [folder / f"forgetting-seed={seed}-epoch={epoch:g}.safetensors" for epoch in epochs] if forgetting else []
        )
        missing = [file for file in files if not file.exists()]
        if missing:
            raise FulguriteError(
                f"{missing[0]} is missing. Remove the folder {place}, and give the same command again."
            )
        found = [load_scores(file) for file in files]
        values = {name: value for part in found for name, value in part.values.items()}
        presentations = {k: v for part in found for k, v in part.provenance.get("presentations", {}).items()}
        runs = [run for part in found for run in part.provenance["runs"]]
        provenance = {**found[0].provenance, "runs": runs, "presentations": presentations}
        parts.append(Scores(values, found[0].targets, provenance))
    return parts


def _sweep(
    console: Console, config: Mapping[str, Any], arguments: argparse.Namespace, out: Path, scores: Scores
) -> list[RunRecord]:
    """Train on all examples, and on fractions of them by each score and at random."""
    variants = [Variant("baseline")]
    for keep in sorted(set(arguments.keep)):
        pruned = f"{_HERE}.intervention.PruneTrainingSet(keep={keep!r}, "
        variants.append(Variant(f"random {keep:g}", add=(f"{pruned}strategy='random')",)))
        for name in scores.values:
            variants.append(Variant(f"{name} {keep:g}", add=(f"{pruned}score={name!r}, source={str(out)!r})",)))
    digest = hashlib.sha256(out.read_bytes()).hexdigest()[:8]  # other scores are other trainings
    return _execute(
        console,
        [Setting("main", config, tuple(variants))],
        range(arguments.seeds),
        arguments.jobs,
        out.with_suffix("") / f"keep-{digest}",
    )


def _execute(
    console: Console, settings: Sequence[Setting], seeds: Sequence[int], jobs: int | None, directory: Path
) -> list[RunRecord]:
    """Run what is not finished, in parallel processes.

    Raises:
        FulguriteError: If a configuration is wrong, or a run fails.
    """
    from fulgurite.cli.progress import ProgressDisplay
    from fulgurite.experiment import check_plan, finished_records, plan, run_plan

    checked = check_plan(plan(settings, seeds), directory)
    total, done = len(checked.runs), len(finished_records(checked, directory / "runs.jsonl"))
    jobs = max(1, min(jobs or checked.default_jobs, total - done))
    console.print(f"{total} runs, {jobs} at a time.{f' {done} are finished already.' if done else ''}", highlight=False)
    with ProgressDisplay(console, total - done) as display:
        records = run_plan(checked, directory, jobs, display)
    failed = [record for record in records if record.status == "failed"]
    if failed:
        raise FulguriteError(f"{len(failed)} of {total} runs failed, the first of them so: {failed[0].error}")
    return records


def _average(files: Sequence[Path], out: Path, never_learned: Any) -> int:
    from fulgurite_plugins.data_selection.data_diet.files import average, load_scores, save_scores

    save_scores(out, average([load_scores(file) for file in files], never_learned))
    sys.stdout.write(f"{out}\n")
    return 0


def _read(path: Path | None) -> dict[str, Any]:
    import yaml

    from fulgurite.cli.compare import EXAMPLE

    if path is None:
        return EXAMPLE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise FulguriteError(
            f"Expected --config to be a YAML file, but {path} cannot be read as one: {error}"
        ) from error
    if not isinstance(config, dict):
        raise FulguriteError(
            f"Expected {path} to hold sections such as model and data, but got {type(config).__name__}."
        )
    return config


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, but got {text}")
    return number
