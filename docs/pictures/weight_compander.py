# SPDX-License-Identifier: Apache-2.0
"""Draw docs/measured/weight_compander.png from the records of the claim.

fulgurite reproduce weight_compander --out OUT && python docs/pictures/weight_compander.py OUT/runs.jsonl PNG
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from torch import Tensor

from fulgurite.models import MLP
from fulgurite.quiet import quiet
from fulgurite.records import read_records
from fulgurite.tasks import Classification
from fulgurite_datamodules import Digits
from fulgurite_plugins.reparametrization import WeightCompander

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def middle_layer(callbacks: list[pl.Callback]) -> Tensor:
    """Return the weights of the middle layer after the training of the claim, noisy labels, seed 0."""
    pl.seed_everything(0, verbose=False)
    module = Classification(
        10,
        (1, 8, 8),
        MLP((1, 8, 8), 10, (256, 256)),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 120),
    )
    data = Digits(train_size=250, val_size=0, test_size=1547, batch_size=50, label_noise=0.15, noise_kind="uniform")
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with quiet():
        pl.Trainer(max_epochs=120, accelerator="cpu", callbacks=callbacks, **off).fit(module, datamodule=data)
    return module.network[3].weight.detach()


errors: dict[tuple[str, str], list[float]] = defaultdict(list)
for record in read_records(Path(sys.argv[1])):
    if record.status == "ok":
        errors[record.setting, record.variant].append(100 * record.metrics["test/error"])
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1.25), layout="constrained")
for name, callbacks, colour in (("plain", [], "tab:grey"), ("Weight Compander 1.2", [WeightCompander()], "tab:blue")):
    weight = middle_layer(callbacks)
    z = ((weight - weight.mean()) / weight.std()).flatten()
    label = f"{name}: kurtosis {float(z.pow(4).mean()):.2f}, largest {float(z.abs().max()):.1f}"
    bins = {"bins": 120, "range": (-4, 4), "density": True, "histtype": "stepfilled"}
    left.hist(z.clamp(-4, 4).numpy(), **bins, alpha=0.55, color=colour, label=label)
left.set(xlabel="weight / standard deviation", ylabel="density", xlim=(-4, 4))
left.set_title("Weights of the middle layer (noisy labels, one seed)")
left.set_ylim(0, left.get_ylim()[1] * 1.25)
left.legend(frameon=False, loc="upper center", fontsize=8)
keys = sorted(errors, key=lambda key: key[0] != "noisy")
names = [f"{v.replace('baseline', 'plain')}{'' if s == 'noisy' else ' (clean labels)'}" for s, v in keys]
for place, key in zip(range(len(keys), 0, -1), keys, strict=True):
    values, colour = errors[key], "tab:blue" if key[1].startswith("WC") else "tab:grey"
    right.barh(place, sum(values) / len(values), color=colour, alpha=0.35, height=0.7)
    right.plot(values, [place] * len(values), "o", ms=3.5, color=colour)
right.set_yticks(range(len(keys), 0, -1), names)
right.set(xlabel="test error (%)", title="Test error, a dot per seed", xlim=(0, None))
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[2], dpi=130)
