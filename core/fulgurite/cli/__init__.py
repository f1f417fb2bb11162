# SPDX-License-Identifier: Apache-2.0
"""The command `fulgurite`. A command's module is imported when it is chosen, so that `list` stays quick.

Distributions add commands in the entry-point group `fulgurite.commands`: the name of the command, and the function that is
called with the words after it and returns the exit status. Listing them imports none of their code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

import fulgurite
from fulgurite.errors import FulguriteError, PluginError, nearest

COMMANDS = "fulgurite.commands"
"""The entry-point group of commands that plugins bring."""

_COMMANDS = {
    "list": ("catalogue", "show what is installed"),
    "show": ("catalogue", "show the card of a plugin, and how its components are used"),
    "explain": ("train", "say which plugin does what in a configuration, in which order, at which cost"),
    "fit": ("train", "train: a LightningCLI in which plugins and data go by their short names"),
    "validate": ("train", "evaluate on the validation data"),
    "test": ("train", "evaluate on the test data"),
    "predict": ("train", "predict"),
    "compare": ("compare", "train with and without plugins over seeds, and say whether they help"),
    "reproduce": ("compare", "test the claim of a plugin's paper"),
    "bench": ("bench", "measure what a plugin costs on this machine"),
    "check": ("check", "hold plugins to the conformance kit"),
    "new": ("new", "write the skeleton of a plugin of your own"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after `fulgurite`; by default those that the process was started with.

    Returns:
        The exit status: 2 for what cannot be done as asked, 130 after Ctrl-C, else that of the command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    try:
        status = _dispatch(command, words[1:])
        sys.stdout.flush()
    except FulguriteError as error:
        sys.stderr.write(f"fulgurite{f' {command}' if command in _COMMANDS else ''}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        return 130
    except BrokenPipeError:  # `fulgurite list | head` has read enough; Python's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _dispatch(command: str, argv: list[str]) -> int:
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if command == "--version":
        sys.stdout.write(f"fulgurite {fulgurite.__version__}\n")
        return 0
    if command not in _COMMANDS:
        return _run_added(command, argv)
    if _COMMANDS[command][0] in ("train", "compare"):
        _find_users_files()
    module = importlib.import_module(f"fulgurite.cli.{_COMMANDS[command][0]}")
    return int(module.run(command, argv))


def _find_users_files() -> None:
    """Let a configuration name classes of the user's own files; they are found as `python -m` finds them."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def _added() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return who declares each command that is not Fulgurite's own; a command of ours cannot be replaced."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in sorted(importlib.metadata.entry_points(group=COMMANDS)):
        if point.name not in _COMMANDS:
            found.setdefault(point.name, []).append(point)
    return found


def _run_added(command: str, argv: list[str]) -> int:
    added = _added()
    if command not in added:
        known = [*_COMMANDS, *added]
        raise FulguriteError(f"No command {command!r}.{nearest(command, known)} `fulgurite --help` shows all.")
    points = added[command]
    if len({point.value for point in points}) > 1:
        owners = " and by ".join(f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points)
        raise PluginError(f"Command {command!r} is declared by {owners}. Uninstall all but one.")
    _find_users_files()
    try:
        run = points[0].load()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".rstrip(". ")
        raise PluginError(f"Command {command!r}: {points[0].value} cannot be imported: {reason}.") from error
    return int(run(argv))


def _help() -> str:
    known = {name: summary for name, (_, summary) in _COMMANDS.items()}
    known |= {name: f"added by {points[0].module}" for name, points in _added().items()}
    width = max(map(len, known))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in known.items())
    return f"""usage: fulgurite COMMAND ...

Methods of research papers on regularisation, as plugins for PyTorch Lightning trainers that already exist.

commands:
{commands}

options:
  -h, --help  show this help; `fulgurite COMMAND --help` shows that of a command
  --version   show the version

environment:
  FULGURITE="PSKD(alpha=0.8)" python train.py   adds plugins to every trainer of a script
  FULGURITE_BLOCK="name,name"                   plugins that shall not be used
"""
