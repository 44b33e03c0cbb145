"""What is known of releases of etcd."""

from __future__ import annotations

import pytest

from celery_etcd_lock.cli.doctor.faults import FAULTS, faults_of, parsed, written


@pytest.mark.parametrize(
    ("version", "auth", "references", "grave", "upgrade"),
    [
        ("3.5.1", False, {"13766", "12528", "20418"}, True, "3.5.28"),
        ("3.5.16", False, {"20418", "20616"}, False, "3.5.28"),
        ("3.5.28", True, set(), False, "3.5.28"),
        ("3.4.23", False, {"12528", "17864"}, False, "3.4.42"),
        ("3.6.0", True, {"20615", "CVE-2026-33343"}, False, "3.6.9"),
        ("3.6.9", True, set(), False, "3.6.9"),
        ("3.7.0-rc.0", True, set(), False, "3.7.0"),
    ],
)
def test_faults_of_a_version(version: str, auth: bool, references: set[str], grave: bool, upgrade: str) -> None:
    """And which release to go to, which has none of them."""
    numbers = parsed(version)
    assert numbers
    found, mended = faults_of(numbers, auth=auth)
    known = " ".join(fault.reference for fault in found)
    assert all(reference in known for reference in references)
    assert bool(found) == bool(references)
    assert any(fault.grave for fault in found) == grave
    assert written(mended) == upgrade
    assert not faults_of(mended, auth=True)[0] or not auth


def test_what_only_matters_under_auth_is_not_told_without() -> None:
    with_auth = faults_of((3, 5, 27), auth=True)[0]
    assert {fault.only_with_auth for fault in with_auth} == {True, False}
    assert not any(fault.only_with_auth for fault in faults_of((3, 5, 27), auth=False)[0])


def test_every_fault_has_its_reference() -> None:
    assert all(any(letter.isdigit() for letter in fault.reference) for fault in FAULTS)


@pytest.mark.parametrize("version", ["", "memory", "3.5"])
def test_what_is_no_version(version: str) -> None:
    assert parsed(version) is None
