# SPDX-License-Identifier: Apache-2.0
"""`pytest --fulgurite-check my_plugin`: every check a test, nothing imported where nobody asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conformance.test_runner import MODULE

pytest_plugins = ["pytester"]


@pytest.fixture
def kit(pytester):
    """Install the distribution of two functions into the folder of a pytest of its own."""
    pytester.makepyfile(acme_kit=MODULE)
    information = pytester.mkdir("acme_kit-1.0.dist-info")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kit\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[fulgurite.plugins]\nkit = acme_kit:plugin\n")
    pytester.syspathinsert()
    return pytester


def run(kit, *options):
    return kit.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore", *options)


def test_every_check_is_a_test_without_a_test_file(kit):
    """Fails if a repository needs more than an option, or a failure or an excuse is lost on the way."""
    result = run(kit, "-rfs", "--fulgurite-check", "kit", "-k", "pure or gradient")
    result.assert_outcomes(passed=1, failed=2, skipped=1)
    result.stdout.fnmatch_lines_random(["SKIPPED*it is known*", "FAILED fulgurite::kit::noisy-loud-gradient*"])
    assert "noisy (loud): gradient: ValueError: red & <angry>" in result.stdout.str()
    assert "Traceback" in result.stdout.str()


def test_beside_tests_of_ones_own(kit):
    """Fails if the option takes the place of the tests, or -k does not choose among the checks."""
    kit.makepyfile(test_own="def test_pure(): pass\n\n\ndef test_other(): pass\n")
    run(kit, "--fulgurite-check", "kit", "-k", "pure and not noisy").assert_outcomes(passed=2, deselected=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fulgurite-check", "kid"], "*No plugin 'kid' is installed. Did you mean 'kit'?*"),
        (["--fulgurite-check", "kit", "--fulgurite-precision", "16-mixed"], "*'16-mixed' needs a GPU*"),
    ],
)
def test_what_cannot_be_checked_is_an_error_of_usage(kit, options, message):
    """Fails if a misspelt plugin is a run without tests that passes."""
    result = run(kit, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_unused_it_imports_nothing_heavy(kit):
    """Fails if everybody who has Fulgurite installed waits for torch whenever pytest starts."""
    kit.makepyfile(test_own="def test_nothing(): pass\n")
    program = (
        "import sys, pytest\n"
        "status = pytest.main(['-q', '-p', 'no:cacheprovider', 'test_own.py'])\n"
        "assert 'fulgurite.testing.pytest_plugin' in sys.modules\n"
        "assert not {'torch', 'lightning', 'numpy', 'rich', 'fulgurite.registry'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=kit.path, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
