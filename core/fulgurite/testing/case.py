# SPDX-License-Identifier: Apache-2.0
"""How a component tells the conformance kit to make small instances of itself, and what it asks to be excused from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True)
class Case:
    """A small instance of a component, and the training in which its effect shows.

    A plugin names its cases in the manifest, `conformance="package.conformance:CASES"`: a mapping from the names of
    components to a case or a tuple of cases (variants of one component that work differently). A component without a case
    is made without arguments.

    Args:
        make: Makes an instance that has an effect within two epochs of a small training. That of an optimizer is given
            the parameters.
        off: Makes an instance that must change nothing (a weight of zero); None if the method has no such setting, which
            is then to be declared under `identity_when_off`.
        label: Tells several cases of one component apart, for instance `"snapshot"`.
        module: Makes the LightningModule to train; None takes the kit's classifiers.
        data: Makes the training dataset, of pairs `(input, class)`; None takes the kit's.
        observes: Whether it trains nothing otherwise, and only logs or remembers. It is held to both: what is trained stays
            as it is, bit for bit, and what it logs or remembers depends on the training.
        arguments: For functions, losses and modules: makes the positional arguments of one call, seeded.
        inapplicable: Checks that do not apply, by name, each with the reason. They are not run, and the reason stands in
            every table; there is no way to run a check and not to count its failure.
    """

    make: Callable[..., Any] | None = None
    off: Callable[[], Any] | None = None
    label: str = ""
    module: Callable[[], pl.LightningModule] | None = None
    data: Callable[[], Any] | None = None
    observes: bool = False
    arguments: Callable[[], tuple[Any, ...]] | None = None
    inapplicable: Mapping[str, str] = field(default_factory=dict)
