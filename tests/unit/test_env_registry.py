"""Suites by name: which environment a name belongs to, and what its entry point offers."""

from __future__ import annotations

import pytest

from rove.envs import conventions, downloads, registry
from rove.errors import RoveError


@pytest.mark.parametrize(
    ("suite", "kind"),
    [
        ("tabletop", "tabletop"),
        ("libero:object,goal", "libero"),
        ("libero_spatial", "libero"),
        ("maniskill", "maniskill"),
        ("maniskill_put_on_plate", "maniskill_put_on_plate"),
        ("maniskill:PickCube-v1", "maniskill"),
        ("tabletops", None),
        ("point", None),
    ],
)
def test_a_name_begins_with_its_environment(suite, kind):
    assert registry.kind_of(suite) == kind


def test_conventions_are_asked_of_the_suite():
    assert "libero_goal_no_noops" in getattr(conventions.find("libero:object,goal"), "statistics", ())
    assert "libero:spatial" in conventions.of("libero").statistics  # its tasks unless others are named
    assert conventions.of("tabletop:train").suite == "tabletop:train"
    assert conventions.find("maniskill") is conventions.find("maniskill:PickCube-v1") is None
    assert conventions.find("point") is None
    with pytest.raises(
        RoveError, match="'libro_spatial'. Choose one of: libero, maniskill_put_on_plate, tabletop"
    ):
        conventions.of("libro_spatial")


@pytest.mark.parametrize("kind", ["maniskill", "maniskill_put_on_plate"])
def test_a_suite_says_what_it_downloads(kind):
    findings = downloads.fetch(kind, only_check=True, say=print)
    assert [finding.name for finding in findings] == ["robot", "scene", "objects"]


def test_a_suite_without_downloads_is_refused():
    with pytest.raises(RoveError, match="Nothing to download for 'tabletop'"):
        downloads.fetch("tabletop", only_check=True, say=print)


def test_a_function_that_a_suite_does_not_have_is_none():
    assert registry.offered("tabletop", "downloads") is None
    with pytest.raises(RoveError, match="Unknown environment 'tabeltop'. Did you mean 'tabletop'"):
        registry.offered("tabeltop", "downloads")
