# SPDX-License-Identifier: Apache-2.0
"""The environment variable `FULGURITE`: callbacks for every trainer of a script that is not ours to edit.

Lightning calls `callbacks` whenever a trainer is made, so that nothing may be imported here before the variable is set.
"""

from __future__ import annotations

import os

VARIABLE = "FULGURITE"


def callbacks() -> list[object]:
    """Return the callbacks that the environment variable describes, newly made; without it none.

    Raises:
        FulguriteError: If the variable cannot be read, or holds something else than callbacks.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return []
    from fulgurite.errors import FulguriteError
    from fulgurite.spec import build_all

    try:
        found = build_all(text)
    except FulguriteError as error:
        raise FulguriteError(f"The environment variable {VARIABLE}={text!r} cannot be used. {error}") from error
    for one in found:
        if not _is_callback(one):
            raise FulguriteError(
                f"Expected the environment variable {VARIABLE} to name callbacks, but {VARIABLE}={text!r} has an object of "
                f"type {type(one).__name__}, which a trainer does not take as one. `fulgurite show` says what it is for."
            )
    return found


def refuse_if_set() -> None:
    """Refuse to measure while the variable adds something to every training, the baseline included.

    Raises:
        FulguriteError: If the variable is set.
    """
    if os.environ.get(VARIABLE, "").strip():
        from fulgurite.errors import FulguriteError

        raise FulguriteError(
            f"The environment variable {VARIABLE}={os.environ[VARIABLE]!r} would be added to every training, the baseline "
            f"included. Unset it, and name additions on the command line."
        )


def _is_callback(found: object) -> bool:
    """Whether it behaves like a callback; `lightning.pytorch` and `pytorch_lightning` have a class of their own each."""
    return all(hasattr(found, name) for name in ("state_key", "setup", "on_train_batch_end", "on_fit_end"))
