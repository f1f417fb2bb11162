# SPDX-License-Identifier: Apache-2.0
"""Honest interventions of every form that a paper's method takes: surgery, a held-out part, another training set.

No check may accuse one of them. Each is the smallest of its form; what a method cannot promise stands in `FORMS`, with the
reason that a plugin of this form would give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fulgurite import Capabilities, Intervention, lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.random import get_random_state, set_random_state
from fulgurite.samples import TrainingSubset
from fulgurite.testing import Case


class Bounded(nn.Module):
    """`w = a arctan(v / b)`, with a learnt bound and a fixed slope."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.log_a = nn.Parameter((2 * weight.detach().abs().max()).log())
        self.register_buffer("b", 2 * weight.detach().abs().max())

    def forward(self, v: Any) -> Any:
        return self.log_a.exp() * torch.arctan(v / self.b)

    def right_inverse(self, w: Any) -> Any:
        return self.b * torch.tan(w / self.log_a.exp())


SHARDED = {"model_parallel": "its layers are made when those of the model have been sharded."}


class Compands(Intervention):
    """Parametrises every weight that is trained, once where it is tied; its own parameters are not decayed."""

    capabilities = Capabilities(refused_strategies=SHARDED)

    def operate(self, module: Any) -> None:
        shared: dict[Any, Any] = {}
        for layer in list(module.modules()):
            weight = getattr(layer, "weight", None)
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or parametrize.is_parametrized(layer, "weight"):
                continue
            if not weight.requires_grad or (weight in shared and shared[weight] is layer):
                continue
            if weight in shared:
                first = shared[weight]
                parametrize.register_parametrization(layer, "weight", first.parametrizations.weight[0], unsafe=True)
                layer.parametrizations.weight.original = first.parametrizations.weight.original
            else:
                parametrize.register_parametrization(layer, "weight", Bounded(weight))
                shared[weight] = layer

    def parameter_options(self, module: Any) -> Any:
        own = [layer.log_a for layer in module.modules() if isinstance(layer, Bounded)]
        return {parameter: {"weight_decay": 0.0, "lr_scale": 0.01} for parameter in own}


class GatedLinear(nn.Linear):
    """Adds a gated second layer; `weight` and `bias` keep their names, and how often it ran is nobody's parameter."""

    def __init__(self, layer: Any, seed: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        generator = torch.Generator().manual_seed(seed)
        self.hyper = nn.Parameter(0.3 * torch.randn(layer.weight.shape, generator=generator))
        self.gate = nn.Parameter(0.3 * torch.randn(layer.out_features, generator=generator))
        self.runs = 0

    def forward(self, inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return F.linear(inputs, self.weight, self.bias) + self.gate * F.linear(inputs, self.hyper)


class Gates(Intervention):
    """Replaces every trained linear layer by one of twice its parameters."""

    capabilities = Capabilities(refused_strategies=SHARDED)

    def operate(self, module: Any) -> None:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.weight.requires_grad:
                    setattr(parent, name, GatedLinear(child, seed=child.out_features))
        if not any(isinstance(layer, GatedLinear) for layer in module.modules()):
            raise RefusedError("gates: expected a linear layer to replace, but found none.")


class Decays(Intervention):
    """A penalty on parameters only, which counts once per update."""

    capabilities = Capabilities(penalises_parameters=True)

    def __init__(self, strength: float = 0.05) -> None:
        self.strength = strength

    def penalty(self, step: Any) -> Any:
        return self.strength * sum(p.square().sum() for p in step.module.parameters() if p.requires_grad)


class KeepsHardest(Intervention):
    """Trains on the examples of highest score; the score of an example is given by its number."""

    capabilities = Capabilities(exclusive=("choice of training examples",))

    def __init__(self, keep: float = 0.5) -> None:
        self.keep = keep
        self.subset: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.keep < 1.0:
            self.subset = TrainingSubset(trainer, self.name)
            source = lightning_adapter.train_source(trainer).dataloader()
            size = len(source.dataset) if hasattr(getattr(source, "dataset", None), "__len__") else 44
            scores = (torch.arange(size) * 7) % size
            self.subset.restrict(scores.topk(max(1, int(self.keep * size))).indices.sort().values)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.subset is not None:
            self.subset.close()
            self.subset = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


class TunesOnHeldOut(Intervention):
    """Learns the strength of a decay on a fifth of the examples, which are not trained on, with a phase of its own."""

    capabilities = Capabilities(
        manual_optimization=False,
        refused_strategies={"model_parallel": "its phase would need the whole model."},
        exclusive=("choice of training examples",),
    )

    def __init__(self, rate: float = 0.05) -> None:
        self.rate = rate
        self.strength = torch.tensor(0.05)
        self.phases = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.current_epoch == 0:
            self.strength, self.phases = torch.tensor(0.05), 0
        loader = lightning_adapter.train_source(trainer).dataloader()
        self.subset = TrainingSubset(trainer, self.name)
        size = len(loader.dataset) if hasattr(getattr(loader, "dataset", None), "__len__") else 44
        held_out = torch.arange(0, size, 5)
        self.subset.restrict(torch.tensor([i for i in range(size) if i % 5]))
        self.stream = (
            torch.utils.data.DataLoader(
                torch.utils.data.Subset(loader.dataset, held_out.tolist()),
                batch_size=4,
                shuffle=True,
                generator=torch.Generator().manual_seed(self.phases),
            )
            if hasattr(loader, "dataset")
            else None
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if getattr(self, "subset", None) is not None:
            self.subset.close()
            self.subset = self.stream = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def penalty(self, step: Any) -> Any:
        return self.strength * sum(p.square().sum() for p in step.module.parameters() if p.requires_grad)

    def constrain(self, module: Any, optimizer: Any) -> None:
        """After every second update, look at a batch of the held-out examples."""
        self.phases += 1
        if self.phases % 2:
            return
        before = get_random_state(module.device)
        self.stream.generator.manual_seed(self.phases)
        inputs, targets = next(iter(self.stream))
        modes = [(child, child.training) for child in module.modules()]
        module.eval()
        with torch.no_grad():
            outputs = module(inputs)
            self.strength = self.strength + self.rate * (F.cross_entropy(outputs, targets) - 1.0).clamp(-1, 1) * 0.1
        for child, mode in modes:
            child.training = mode
        set_random_state(before)

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "strength": self.strength, "phases": self.phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.strength, self.phases = state_dict["strength"].clone(), state_dict["phases"]


CHOOSES = {"limited_batches": "it chooses from all examples, and the limit counts batches of those that it has chosen"}
HOLDS_OUT = {
    **CHOOSES,
    "accumulation": "of two micro-batches the second is short, and both are weighted alike",
    "two_ranks_equal_one": "the examples that are left cannot be divided evenly",
}
FORMS = {
    "compands": (Compands, Case(make=Compands)),
    "gates": (Gates, Case(make=Gates)),
    "decays": (Decays, Case(make=Decays, off=lambda: Decays(0.0))),
    "keeps_hardest": (KeepsHardest, Case(make=KeepsHardest, off=lambda: KeepsHardest(1.0), inapplicable=CHOOSES)),
    "tunes_on_held_out": (TunesOnHeldOut, Case(make=TunesOnHeldOut, inapplicable=HOLDS_OUT)),
}
