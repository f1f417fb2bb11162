# SPDX-License-Identifier: Apache-2.0
"""The command `fulgurite`. A command's module is imported when it is chosen, so that `list` stays quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import fulgurite
from fulgurite.errors import FulguriteError, nearest

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
        raise FulguriteError(f"No command {command!r}.{nearest(command, _COMMANDS)} `fulgurite --help` shows all.")
    if _COMMANDS[command][0] in ("train", "compare") and not {"", os.getcwd()} & set(sys.path):
        # A configuration may name classes of the user's own files; they are found as `python -m` finds them.
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(f"fulgurite.cli.{_COMMANDS[command][0]}")
    return int(module.run(command, argv))


def _help() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in _COMMANDS.items())
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
