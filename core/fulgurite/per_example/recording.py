# SPDX-License-Identifier: Apache-2.0
"""Recording, in a forward pass, all that the closed forms need; and which parameters they do not cover."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fulgurite.per_example.gradients import Dense, Gradient, added
from fulgurite.per_example.layers import RULES, has_examples_first, has_rule


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Args:
        layer: The layer.
        inputs: What it was given, detached.
        version: The version of `inputs` in the call.
        edge: Where the gradient of what it returned can be asked for, whatever happens to that tensor in place.
    """

    layer: nn.Module
    inputs: Tensor
    version: int
    edge: GradientEdge

    def prepared(self, name: str) -> Tensor:
        """Return what the gradient of the layer's parameter `name` needs besides the gradient of the outputs."""
        if name == "bias":
            return self.inputs
        if self.inputs._version != self.version:
            raise RuntimeError(
                f"The input of {self.layer} was changed in place after the layer had used it. Its gradient cannot be "
                f"computed, in training neither."
            )
        return RULES[type(self.layer)].prepare(self.layer, at_least_float32(self.inputs))

    def gradient(self, name: str, prepared: Tensor, of_output: Tensor) -> Gradient:
        """Return the gradient of the layer's parameter `name`."""
        rule, of_output = RULES[type(self.layer)], at_least_float32(of_output)
        if name == "bias":
            return Dense(rule.bias(self.layer, of_output))
        return rule.weight(self.layer, prepared, of_output)


@dataclass
class Recording:
    """The calls of one forward pass.

    Args:
        chosen: The chosen parameters, by name.
        calls: The calls of layers with closed forms that own some of them.
        uncovered: Parameters whose gradients the calls do not tell.
    """

    chosen: Mapping[str, nn.Parameter]
    calls: list[Call] = field(default_factory=list)
    uncovered: set[nn.Parameter] = field(default_factory=set)

    def settle(self, outputs: Tensor) -> None:
        """Drop calls that `outputs` do not depend on, and find the parameters that are used outside the calls.

        A parameter is covered if the graph leads to it exactly as often as layers that own it were called.

        Raises:
            ValueError: If `outputs` carry no gradient.
        """
        if not outputs.requires_grad:
            raise ValueError(
                "Expected outputs and losses that depend on the model's parameters, but they carry no gradient. Remove "
                "`detach` or `no_grad` from the model and the loss."
            )
        nodes, uses = graph_of(outputs)
        self.calls = [call for call in self.calls if call.edge.node in nodes]
        recorded = Counter(parameter for call in self.calls for parameter in call.layer._parameters.values())
        self.uncovered |= {p for p in self.chosen.values() if uses[p] != recorded[p]}

    def gradients(self, of_outputs: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, list[Gradient]]]:
        """Yield the gradients of each covered parameter that was used, of one after the other.

        Args:
            of_outputs: For each of several scalars, its gradients with respect to the outputs of `calls`.

        Yields:
            The parameter's name, and its gradient for each of the scalars.
        """
        uses: defaultdict[Any, list[tuple[int, Call, str]]] = defaultdict(list)
        for number, call in enumerate(self.calls):
            for own, parameter in call.layer._parameters.items():
                uses[parameter].append((number, call, own))
        for name, parameter in self.chosen.items():
            if parameter not in uses or parameter in self.uncovered:
                continue
            prepared = [(number, call, own, call.prepared(own)) for number, call, own in uses[parameter]]
            each = ([call.gradient(own, x, found[n]) for n, call, own, x in prepared] for found in of_outputs)
            yield name, [added(gradients, parameter.shape) for gradients in each]


@contextmanager
def recorded(model: nn.Module, chosen: Mapping[str, nn.Parameter], number: int) -> Iterator[Recording]:
    """Record the calls of layers during a forward pass on `number` examples."""
    recording = Recording(chosen)
    parameters = set(chosen.values())

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        own = {p for p in layer._parameters.values() if p in parameters}
        inputs: Any = args[0] if args else kwargs.get("input")
        if torch.is_grad_enabled() and has_examples_first(layer, inputs, outputs, number):
            recording.calls.append(Call(layer, inputs.detach(), inputs._version, get_gradient_edge(outputs)))
        else:
            recording.uncovered.update(own)

    hooks = [
        # First of all forward hooks: what others make of the output is not the layer's.
        layer.register_forward_hook(note, prepend=True, with_kwargs=True)
        for layer in model.modules()
        if has_rule(layer) and any(p in parameters for p in layer._parameters.values())
    ]
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def output_gradients(outputs: Tensor, recording: Recording, keep_graph: bool = False) -> Sequence[Tensor]:
    """Return the gradients of the sum of `outputs` with respect to what the recorded calls returned."""
    if not recording.calls:
        return ()
    edges = [call.edge for call in recording.calls]
    return torch.autograd.grad(outputs.sum(), edges, retain_graph=keep_graph)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return floating point numbers in float32 or float64; indices as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def graph_of(outputs: Tensor) -> tuple[set[Node], Counter[Any]]:
    """Return the nodes that a tensor depends on, and how many edges lead to each leaf."""
    nodes: set[Node] = set()
    uses: Counter[Any] = Counter()
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if leaf is None:
                waiting.append(following)
            else:
                uses[leaf] += 1
    return nodes, uses
