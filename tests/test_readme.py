"""The README's size, its first screen, and that what it links to is there."""

import re

from tests.common import ROOT

README = (ROOT / "README.md").read_text()
FIRST_SCREEN = 25  # lines


def test_it_is_short_and_opens_with_a_picture():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert len(README.encode()) <= 10_000
    assert any(line.startswith("<img") for line in lines[:FIRST_SCREEN])


def test_every_link_leads_to_a_file():
    links = re.findall(r"""\]\(([^)#]+)[^)]*\)|src="([^"]+)""", README)
    links = [link or image for link, image in links]
    assert len(links) > 20
    missing = [link for link in links if "://" not in link and not (ROOT / link).is_file()]
    assert not missing


def test_its_commands_are_those_that_other_tests_run():
    """The blocks in order: main job, tests, own images (test_own_data), Python (test_api)."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
    assert [language for language, _ in blocks] == ["bash", "bash", "sh", "python"]
    assert "python -m launch.train --config=digits --workdir=runs/digits\n" in blocks[0][1]
