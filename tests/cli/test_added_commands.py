# SPDX-License-Identifier: Apache-2.0
"""Commands that distributions add in the entry-point group `fulgurite.commands`."""

from __future__ import annotations

from tests.third_party.install import fulgurite as run


def test_help_lists_added_commands_and_imports_none_of_their_code(tmp_path):
    marker = tmp_path / "imported"
    result = run("--help", path=("commands",), THIRD_PARTY_MARKER=str(marker))
    assert result.returncode == 0
    assert "weigh" in result.stdout
    assert "added by acme_commands" in result.stdout
    assert result.stderr == ""  # torch, too, was not imported
    assert not marker.exists()


def test_an_added_command_gets_the_words_after_it_and_gives_the_exit_status():
    result = run("weigh", "one", "--two", path=("commands",))
    assert (result.stdout, result.returncode) == ("weighed ['one', '--two']\n", 2)


def test_what_it_raises_is_shown_like_any_other_mistake():
    result = run("weigh", "--heavy", path=("commands",))
    assert result.returncode == 2
    assert "That is too heavy. Give less." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_command_of_ours_cannot_be_replaced():
    result = run("list", path=("commands",))
    assert "ps_kd" in result.stdout
    assert "weighed" not in result.stdout


def test_one_that_cannot_be_imported_is_named_and_a_typing_error_gets_a_hint():
    broken = run("broken-command", path=("commands",))
    assert broken.returncode == 2
    assert "acme_commands_that_is_not_there:run cannot be imported: ModuleNotFoundError" in broken.stderr
    assert "Did you mean 'weigh'?" in run("wegh", path=("commands",)).stderr


def test_two_of_one_name_are_refused_with_both_owners():
    result = run("weigh", path=("commands", "commands_too"))
    assert result.returncode == 2
    assert "acme-commands (acme_commands:weigh) and by acme-commands-too" in result.stderr
