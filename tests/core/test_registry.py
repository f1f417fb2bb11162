# SPDX-License-Identifier: Apache-2.0
"""Plugins of other distributions are found, used and, if something is wrong with one, told about; the rest work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fulgurite.errors import PluginError
from fulgurite.plugin import Component, Plugin
from fulgurite.registry import Entry, Registry, discover, registry
from tests.third_party.install import installed

BUILT_IN = Entry("ps_kd", "fulgurite_plugins.distillation.ps_kd:plugin", "fulgurite", "1", "")


def test_a_third_party_plugin_is_found_without_executing_it():
    """Fails if entry points of others are missed, or finding them imports their code."""
    with installed("good") as plugins:
        entry = next(entry for entry in plugins.entries if entry.name == "acme")
        assert entry == Entry("acme", "acme_good:plugin", "acme-good", "1.2", "A plugin that works.")
        assert not entry.builtin
        assert "acme_good" not in sys.modules
        assert "acme" not in plugins.problems()
        assert plugins.plugin("acme").summary == "Counts batches."
        assert plugins.plugin("acme") is plugins.plugin("acme")


def test_the_built_in_catalogue_is_in_the_entry_points():
    """Fails if Fulgurite finds its own plugins in another way than those of others."""
    assert BUILT_IN.name in {entry.name for entry in discover() if entry.builtin}


def test_components_go_by_short_and_by_qualified_name():
    """Fails if either spelling stops working, or the qualified one executes other plugins than the one it names."""
    with installed("good", "broken") as plugins:
        assert plugins.find("acme.Counter")[1].kind == "callback"
        assert "broken" not in plugins.problems(), "a qualified name needs no other manifest"
        assert plugins.find("Counter")[0].name == "acme"


def test_an_ambiguous_component_names_both_plugins():
    """Fails if one of two components of a name silently wins."""
    with installed("good") as plugins:
        with pytest.raises(PluginError, match=r"`acme\.Digits` or `datamodules\.Digits`"):
            plugins.find("Digits")
        assert plugins.find("datamodules.Digits")[1].target.startswith("fulgurite_datamodules")


@pytest.mark.parametrize(
    ("distribution", "slug", "reason"),
    [
        ("broken", "broken", r"'acme_broken:plugin' of acme-broken 0\.3 failed: RuntimeError: acme needs a device"),
        ("misnamed", "misnamed", r"acme-misnamed 1\.0 is called 'other_name', but its entry point 'misnamed'"),
        ("untyped", "untyped", r"expected .* of acme-untyped 1\.0 to be a fulgurite\.Plugin, but got .* dict"),
    ],
)
def test_what_is_broken_has_a_reason_and_harms_nobody(distribution, slug, reason):
    """Fails if a broken manifest is silent, or takes the other plugins down with it."""
    with installed(distribution, "good") as plugins:
        with pytest.raises(PluginError, match=reason) as error:
            plugins.plugin(slug)
        assert slug in str(error.value)
        assert slug in plugins.problems()
        assert {"acme", "ps_kd"} <= {plugin.name for plugin in plugins.plugins()}
        assert plugins.find("PSKD")[0].name == "ps_kd"


def test_a_broken_import_is_the_cause_of_the_error():
    """Fails if the traceback of a plugin's own error is lost, so that its author cannot find it."""
    with installed("broken") as plugins:
        for _ in range(2):
            with pytest.raises(PluginError) as error:
                plugins.plugin("broken")
            assert isinstance(error.value.__cause__, RuntimeError)


def test_two_plugins_of_one_name_are_both_refused():
    """Fails if the order of the path decides which of two plugins is used, or a distribution is not named."""
    with installed("clash_a", "clash_b", "good") as plugins:
        assert [entry.distribution for entry in plugins.entries if entry.name == "twice"] == [
            "acme-clash-a",
            "acme-clash-b",
        ]
        with pytest.raises(PluginError, match=r"acme-clash-a 1\.0 and by acme-clash-b 2\.0"):
            plugins.plugin("twice")
        with pytest.raises(PluginError, match="No plugin has a component 'Twice'"):
            plugins.find("Twice")
        assert not {"acme_clash_a", "acme_clash_b"} & set(sys.modules)
        assert plugins.plugin("acme").name == "acme"


@pytest.mark.parametrize(
    ("component", "reason"),
    [("NoModule", "ModuleNotFoundError: .*acme_lying.nowhere"), ("NoName", "AttributeError: .*NoName")],
)
def test_a_manifest_that_promises_too_much(component, reason):
    """Fails if a missing target is not traced to its plugin, or spoils the plugin's other components."""
    with installed("lying") as plugins:
        plugin, found = plugins.find(component)
        with pytest.raises(PluginError, match=f"Plugin 'lying': .*{reason}"):
            plugins.load(plugin, found.target)
        assert plugins.load(*_of(plugins, "There")).__name__ == "There"


def _of(plugins: Registry, name: str) -> tuple[Plugin, str]:
    plugin, component = plugins.find(name)
    return plugin, component.target


def test_a_missing_extra_is_named_with_its_distribution():
    """Fails if the message does not say what to install."""
    with installed("extras") as plugins, pytest.raises(PluginError, match=r"pip install 'acme-extras\[solver\]'"):
        plugins.load(*_of(plugins, "AtImport"))


def test_unknown_names_get_suggestions():
    """Fails if a typing error is answered without the nearest names."""
    plugins = Registry([BUILT_IN])
    with pytest.raises(PluginError, match="Did you mean 'ps_kd'"):
        plugins.plugin("pskd")
    with pytest.raises(PluginError, match="Did you mean 'PSKD'"):
        plugins.find("PSDK")
    with pytest.raises(PluginError, match="Plugin 'ps_kd' has no component 'PSDK'. Did you mean 'PSKD'"):
        plugins.find("ps_kd.PSDK")
    with pytest.raises(PluginError, match="No plugin 'ps_kdd'"):
        plugins.find("ps_kdd.PSKD")


def test_an_unknown_component_is_told_what_could_not_be_looked_into():
    """Fails if a component of a broken plugin is called unknown without a word on the plugin."""
    with installed("broken") as plugins, pytest.raises(PluginError, match="Plugin 'broken': .*RuntimeError"):
        plugins.find("SomethingOfTheBrokenPlugin")


def test_a_blocked_plugin_is_refused(monkeypatch):
    """Fails if a blocked plugin can still be used, by either way of blocking, or the others cannot."""
    monkeypatch.setenv("FULGURITE_BLOCK", " acme , not_installed")
    with installed("good") as plugins:
        with pytest.raises(PluginError, match="'acme' cannot be used: it is blocked"):
            plugins.plugin("acme")
        assert "acme_good" not in sys.modules
        assert plugins.problems().keys() >= {"acme"}
        assert plugins.find("PSKD")[0].name == "ps_kd"
        plugins.block("ps_kd")
        with pytest.raises(PluginError, match="No plugin has a component 'PSKD'"):
            plugins.find("PSKD")


def test_blocking_after_loading_counts():
    """Fails if a manifest that was read before the block is still handed out."""
    plugins = Registry([BUILT_IN])
    plugins.plugin("ps_kd")
    plugins.block("ps_kd")
    with pytest.raises(PluginError, match="blocked"):
        plugins.plugin("ps_kd")


def test_entry_points_are_read_once():
    """Fails if every question reads the metadata of all distributions anew."""
    assert registry() is registry()


def test_unreadable_metadata_of_another_distribution_is_told_and_skipped(tmp_path, monkeypatch):
    """Fails if one damaged distribution hides all plugins."""
    info = tmp_path / "acme_damaged-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[fulgurite.plugins]\ndamaged = acme_damaged:plugin\n")  # and no METADATA
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="cannot be read"):
        entries = discover()
    assert "ps_kd" in {entry.name for entry in entries}


def test_reading_every_built_in_manifest_imports_no_torch():
    """Fails if a manifest imports its components, which would make `fulgurite list` slow."""
    code = (
        "import sys; from fulgurite.registry import registry; r = registry();"
        "[r.plugin(e.name) for e in r.entries if e.builtin];"
        "import fulgurite_plugins.distillation as d; dir(d);"
        "sys.exit(bool({'torch', 'lightning', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_family_exports_what_its_papers_do():
    """Fails if `from fulgurite_plugins.distillation import PSKD` breaks, or unknown names look as if they existed."""
    import fulgurite_plugins.distillation as family
    from fulgurite_plugins.distillation import PSKD, ps_kd

    assert PSKD is ps_kd.PSKD
    assert {"PSKD", "ps_kd"} <= set(dir(family))
    assert not hasattr(family, "plugin"), "a family has no manifest"
    with pytest.raises(AttributeError, match="no attribute 'PSDK'"):
        family.PSDK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "PS-KD"}, "`name` of Plugin to be a lower-case slug"),
        ({"claim": "somewhere"}, '`claim` of Plugin to be "package.module:NAME"'),
        ({"components": (Component("A", "a:A", "module"), Component("A", "b:A", "module"))}, "distinct names"),
    ],
)
def test_a_manifest_checks_itself(arguments, message):
    """Fails if a manifest that cannot work is accepted."""
    with pytest.raises(ValueError, match=message):
        Plugin(**{"name": "a", "family": "b", "summary": "c", "components": (), **arguments})
