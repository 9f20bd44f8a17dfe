"""The three rules of the house: imports point down, tools stay outside, launch/ reads the flags."""

import ast
import pathlib

import pytest

from ntm_jax.errors import UserError
from ntm_jax.projects.reward import rewards
from ntm_jax.registry import load, present
from ntm_jax.training.reward.rewards import Scores

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (  # from the ground up; a room imports from lower floors
    {"errors", "host_memory", "workers"},
    {"registry"},
    {"files", "progress"},
    {"typed"},
    {"core"},
    {"backbones", "data"},
    {"runtime"},
    {"sampling"},
    {"evaluation"},
    {"export"},
    {"training"},
    {"api"},
)
OUTSIDE = {"projects", "tools"}  # may import the building, which imports none of them
FLAGS = ("absl.app", "absl.flags", "argparse", "ml_collections.config_flags")


def imports(folder: str) -> dict[str, set[str]]:
    """The modules and names that each Python file of a folder imports, anywhere in it."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = found[str(path.relative_to(ROOT))] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


PACKAGE = imports("ntm_jax")


def room(path: str) -> str:
    """The room of a file or module: the part of its name after ntm_jax, api for ntm_jax itself."""
    name = path.removesuffix(".py").replace("/", ".").split(".")[1]
    return "api" if name in ("__init__", "experiment", "load", "train") else name


def imported_rooms() -> set[tuple[str, str, str]]:
    """(file, its room, another room that it imports) of every file in ntm_jax/."""
    return {(path, room(path), room(name)) for path, names in PACKAGE.items() for name in names
            if name.startswith("ntm_jax.") and room(name) not in (room(path), "experiments")}


def test_imports_point_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    building = [found for found in imported_rooms() if not OUTSIDE & {*found[1:]}]
    assert {path for path, own, other in building if floor[other] >= floor[own]} == set()


def test_the_building_imports_no_project_and_no_tool_and_they_not_each_other():
    assert {path for path, _, other in imported_rooms() if other in OUTSIDE} == set()


def test_only_launch_reads_flags():
    readers = {path for path, names in (PACKAGE | imports("experiments")).items()
               if any(name.startswith(FLAGS) for name in names)}
    assert readers == set()


def test_a_missing_project_is_one_line():
    place = "ntm_jax.projects.nowhere.part:function"
    with pytest.raises(UserError, match=r"has no ntm_jax\.projects\.nowhere\.part: install the"):
        load(place)
    assert not present(place)
    assert present("ntm_jax.projects.reward.settings:Reward")


def test_rewards_are_found_under_their_earlier_name():
    assert Scores is rewards.Scores
