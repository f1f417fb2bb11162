# SPDX-License-Identifier: Apache-2.0
"""Component texts: what can be written, and that everything else is refused with the piece that offends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fulgurite import Schedule
from fulgurite.errors import FulguriteError
from fulgurite.spec import build, build_all, short_name
from fulgurite_plugins.distillation import PSKD
from tests.third_party.install import installed


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("PSKD", 0.8),
        ("PSKD()", 0.8),
        ("PSKD(alpha=0.5)", 0.5),
        ("PSKD(0.5)", 0.5),
        (" ps_kd.PSKD( alpha = +.5 ) ", 0.5),
        ("fulgurite_plugins.distillation.PSKD(1)", 1),
        ("fulgurite_plugins.distillation.ps_kd.intervention.PSKD", 0.8),
        ("PSKD(alpha=Schedule(0.4, shape='cosine'))", Schedule(0.4, shape="cosine")),
        ("PSKD(alpha=Schedule.constant(0.5))", Schedule.constant(0.5)),
    ],
)
def test_spellings(text, alpha):
    """Fails if a documented spelling of a component, or of a schedule in it, is not understood."""
    built = build(text)
    assert type(built) is PSKD
    assert built.alpha == alpha


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("[1, -2.5, 'a']", [1, -2.5, "a"]),
        ("(True, None)", (True, None)),
        ("{'a': {'b': [1]}}", {"a": {"b": [1]}}),
        ("'torch.float16'", "torch.float16"),
        ("[Schedule.constant(1)]", [Schedule.constant(1)]),
        ("()", ()),
        ("-3", -3),
        ("'a' 'b'", "ab"),
    ],
)
def test_values(written, value):
    """Fails if a plain value reaches the constructor as something else."""
    with installed("good"):
        assert build(f"Counter(1, names={written})").names == value


def test_a_registered_component_as_an_argument():
    """Fails if a component cannot be given to another one."""
    with installed("good"):
        inner = build("Counter(1, names=[acme.Counter(every=2), ps_kd.PSKD()])").names
        assert (inner[0].every, type(inner[1])) == (2, PSKD)


def test_several():
    """Fails if commas between components are confused with those between arguments."""
    built = build_all("PSKD(0.5, teacher='snapshot'), ps_kd.PSKD, PSKD(alpha=0.1),")
    assert [one.alpha for one in built] == [0.5, 0.8, 0.1]
    assert [one.alpha for one in build_all("(PSKD(0.2), PSKD)")] == [0.2, 0.8]
    assert len(build_all("PSKD")) == 1
    with pytest.raises(FulguriteError, match="Expected one component .* got 2"):
        build("PSKD, PSKD")


@pytest.mark.parametrize(
    ("text", "name"),
    [("PSKD(alpha=0.8)", "PSKD"), ("ps_kd.PSKD", "PSKD"), ("a.b.C(x=D(1))", "C"), ("Unknown()", "Unknown")],
)
def test_short_name(text, name):
    """Fails if a variant of a comparison gets a wrong or an ugly name."""
    assert short_name(text) == name


def test_reading_a_name_imports_no_torch():
    """Fails if naming the variants of a comparison pays for importing them."""
    code = "import sys; from fulgurite.spec import short_name; short_name('A(b=C())'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("PSKD(alpha=x)", "`x`"),
        ("PSKD(alpha=torch.float16)", "`torch.float16`"),
        ("PSKD(alpha=0.4 + 0.4)", "`0.4 + 0.4`"),
        ("PSKD(alpha=not True)", "`not True`"),
        ("PSKD(alpha=-True)", "`-True`"),
        ("PSKD(alpha=--1)", "`--1`"),
        ("PSKD(alpha=[i for i in (1,)])", "`[i for i in (1,)]`"),
        ("PSKD(alpha=lambda: 1)", "`lambda: 1`"),
        ("PSKD(alpha=f'{1}')", "`f'{1}'`"),
        ("PSKD(alpha=a[0])", "`a[0]`"),
        ("PSKD(alpha=1j)", "`1j`"),
        ("PSKD(alpha=...)", "`...`"),
        ("PSKD(alpha=1 if True else 2)", "`1 if True else 2`"),
        ("PSKD(alpha={**{}})", r"`{**{}}`"),
        ("PSKD(*[1])", "`*[1]`"),
        ("PSKD(**{'alpha': 1})", "`**{'alpha': 1}`"),
        ("PSKD(alpha=(y := 1))", "`(y := 1)`"),
        ("PSKD()()", "`PSKD()`"),
        ("PSKD().alpha", "`PSKD()`"),
        ("[PSKD]", "`[PSKD]`"),
        ("PSKD + PSKD", "`PSKD + PSKD`"),
        ("'PSKD'", "`'PSKD'`"),
        ("PSKD(alpha=__import__('os'))", "'__import__'"),
    ],
)
def test_everything_else_is_refused_with_the_piece(text, piece):
    """Fails if something beyond plain values and calls of components is read, or the message does not show it."""
    with pytest.raises(FulguriteError) as error:
        build(text)
    assert piece in str(error.value)


@pytest.mark.parametrize(
    "text", ["", " ", "PSKD(", "PSKD alpha=1", "PSKD(alpha:1)", "PSKD; PSKD", "PSKD,,", "=", "PSKD\0"]
)
def test_what_is_not_an_expression(text):
    """Fails if a text that cannot be parsed ends in a traceback, or without an example of what is right."""
    with pytest.raises(FulguriteError, match=r"such as PSKD\(alpha=0\.8\), but got"):
        build(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "PSKD(alhpa=1)",
            r"PSKD\(alhpa=1\): there is no argument `alhpa`. Did you mean 'alpha'\? It takes: alpha, teacher",
        ),
        ("PSKD(1, alpha=2)", "multiple values for argument 'alpha'"),
        ("PSKD(alpha=1, alpha=2)", "`alpha` is given twice"),
        ("PSKD(1, 'memory', 1, 'a', 'b', 'c', 1, 'd', 'e')", "too many positional arguments"),
        ("PSKD(alpha=Schedule())", r"Schedule\(\): missing a required argument: 'end'. It takes: end, start"),
        ("PSKD(alpha=Schedule(1, shap='linear'))", "no argument `shap`. Did you mean 'shape'"),
        ("PSKD(alpha=1.2)", r"PSKD\(alpha=1\.2\): Expected `alpha` of PSKD to be in \[0, 1\]"),
        ("PSKD(alpha=Schedule(0.5, shape='bent'))", r"Schedule\(0\.5, shape='bent'\): Expected `shape` of Schedule"),
        ("PSKD(alpha=Schedule('high'))", "Expected `end` of Schedule"),
    ],
)
def test_arguments_that_do_not_fit(text, message):
    """Fails if a wrong argument is not answered with its text and with what would be right."""
    with pytest.raises(FulguriteError, match=message):
        build(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PSDK", "Did you mean 'PSKD'"),
        ("ps_kd.PSDK", "Did you mean 'PSKD'"),
        ("pskd.PSKD", r"no plugin and no module is called 'pskd'\. Did you mean 'ps_kd'"),
        ("fulgurite.nowhere.PSKD", "no module is called 'fulgurite.nowhere'"),
        ("fulgurite_plugins.distillation.PSDK", "Module 'fulgurite_plugins.distillation' has no class 'PSDK'"),
        ("os.getcwd()", r"Expected os\.getcwd to be a class"),
        ("acme_broken.Part", "acme_broken.Part cannot be imported: RuntimeError: acme needs a device"),
    ],
)
def test_names_that_lead_nowhere(text, message):
    """Fails if an unknown name, or an import path that leads nowhere, is not answered with what was looked for."""
    with installed("broken"), pytest.raises(FulguriteError, match=message):
        build(text)


def test_the_plugin_of_a_missing_extra_says_what_to_install():
    """Fails if an import error inside a component does not lead to the extra that its plugin declares."""
    with installed("extras"):
        for text in ("AtImport", "AtUse"):
            with pytest.raises(FulguriteError, match=r"pip install 'acme-extras\[solver\]'"):
                build(text)


def test_further_keyword_arguments_are_passed_on():
    """Fails if a component that takes any keyword is refused one."""
    with installed("good"):
        assert build("Counter(every=1, anything=3)").options == {"anything": 3}
