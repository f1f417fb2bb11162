# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/self_tuning_networks.png: the courses of three trainings of the claim, seed 0.

python docs/pictures/self_tuning_networks.py PNG
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fulgurite import spec
from fulgurite.cli.train import assemble
from fulgurite.quiet import quiet
from fulgurite_plugins.bilevel.self_tuning_networks.claim import CONFIG, STARTS, tuned
from fulgurite_plugins.bilevel.self_tuning_networks.course import Course, draw

_OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def course(start: float, folder: str) -> Course:
    """Return the course of the training that tunes from a start, and print its test loss."""
    trainer = {**CONFIG["trainer"], **_OFF, "default_root_dir": folder}
    tuner = spec.build(tuned(start))
    with quiet():
        cli = assemble({**CONFIG, "trainer": trainer}, callbacks=[tuner], seed=0)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        (metrics,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    sys.stdout.write(f"from {start}: test loss {metrics['test/nll']:.3f}\n")
    return tuner.course


with tempfile.TemporaryDirectory() as folder:
    courses = {f"from {start}": course(start, folder) for start in STARTS}
Path(sys.argv[1]).write_bytes(draw(courses))
