# SPDX-License-Identifier: Apache-2.0
"""Comparisons of variants over seeds: planned, checked, run in parallel processes, recorded and resumed.

`fulgurite compare` and `fulgurite reproduce` are built on it:

    runs = plan([Setting("main", config, (Variant("baseline"), Variant("PSKD", add=("PSKD",))))], seeds=range(5))
    records = run_plan(check_plan(runs, directory), directory, jobs=2, listener=listener)

Nothing here imports torch in the calling process.
"""

from fulgurite.experiment.plan import Run, plan, with_overrides
from fulgurite.experiment.runner import Checked, Listener, check_plan, finished_records, run_plan

__all__ = ["Checked", "Listener", "Run", "check_plan", "finished_records", "plan", "run_plan", "with_overrides"]
