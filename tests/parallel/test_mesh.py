"""Ranks and places are one to one, groups divide the ranks; and one process of a pipeline reads; for any grid."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.parallel.mesh import AXES, Mesh

PACKAGE = Path(__file__).resolve().parents[2] / "jllm"
meshes = st.builds(
    Mesh,
    **{axis: st.integers(1, 4) for axis in AXES},
    order=st.permutations(AXES).map(tuple),
)
some_axes = st.sets(st.sampled_from(AXES))


@settings(deadline=None)
@given(mesh=meshes)
def test_ranks_and_places_are_one_to_one(mesh: Mesh) -> None:
    places = [mesh.place(rank) for rank in mesh.ranks]
    assert len(places) == mesh.pipe * mesh.data * mesh.sequence * mesh.tensor
    for rank, place in enumerate(places):
        assert mesh.rank_at(**{axis: getattr(place, axis) for axis in AXES}) == place.rank == rank
    assert len({tuple(getattr(place, axis) for axis in AXES) for place in places}) == mesh.world_size


@settings(deadline=None)
@given(mesh=meshes)
def test_the_last_axis_of_the_order_is_the_innermost(mesh: Mesh) -> None:
    places = [tuple(getattr(mesh.place(rank), axis) for axis in mesh.order) for rank in mesh.ranks]
    assert places == sorted(places)


@settings(deadline=None)
@given(mesh=meshes, axes=some_axes)
def test_groups_divide_the_ranks(mesh: Mesh, axes: set[str]) -> None:
    groups = mesh.groups(*axes)
    assert groups == tuple(sorted(groups, key=lambda group: group[0]))
    assert sorted(rank for group in groups for rank in group) == list(mesh.ranks)
    for group in groups:
        assert list(group) == sorted(group)
        members = [mesh.place(rank) for rank in group]
        for axis in AXES:
            places = {getattr(member, axis) for member in members}
            assert places == set(range(mesh.size(axis))) if axis in axes else len(places) == 1
        for member in members:
            assert member.group(*axes) == group


@settings(deadline=None)
@given(mesh=meshes)
def test_one_process_of_a_pipeline_reads(mesh: Mesh) -> None:
    assert len(mesh.pipelines) == mesh.data
    for pipeline in mesh.pipelines:
        members = [mesh.place(rank) for rank in pipeline]
        [reader] = [member for member in members if member.is_reader]
        assert reader.pipe == reader.sequence == reader.tensor == 0
        assert {member.reader for member in members} == {reader.rank}
    assert sorted(mesh.readers) == [rank for rank in mesh.ranks if mesh.place(rank).is_reader]
    assert mesh.readers[0] == 0
    assert [rank for rank in mesh.ranks if mesh.place(rank).is_first] == [0]


@settings(deadline=None)
@given(mesh=meshes, items=st.integers(0, 9))
def test_what_is_written_is_written_once(mesh: Mesh, items: int) -> None:
    """Each slice of each stage has one writer of its weights, and one of every item that its copies hold alike."""
    slices = [(place.pipe, place.tensor) for place in map(mesh.place, mesh.writers)]
    assert sorted(slices) == [(pipe, tensor) for pipe in range(mesh.pipe) for tensor in range(mesh.tensor)]
    assert [rank for rank in mesh.ranks if mesh.place(rank).is_writer] == sorted(mesh.writers)
    owners = Counter(
        (place.pipe, place.tensor, item)
        for place in map(mesh.place, mesh.ranks)
        for item in range(items)
        if place.owns(item)
    )
    assert owners == {(*each, item): 1 for each in slices for item in range(items)}


@settings(deadline=None)
@given(mesh=meshes)
def test_stages(mesh: Mesh) -> None:
    by_stage = mesh.by_stage([mesh.place(rank).pipe for rank in mesh.ranks])
    assert by_stage == [[stage] * (mesh.world_size // mesh.pipe) for stage in range(mesh.pipe)]
    for ends in mesh.ends:
        first, last = map(mesh.place, ends)
        assert (first.pipe, last.pipe) == (0, mesh.pipe - 1)
        assert (first.data, first.sequence, first.tensor) == (last.data, last.sequence, last.tensor)
        assert first.leads(ends)
        assert last.leads(ends) == (mesh.pipe == 1)
    assert len(mesh.ends) * mesh.pipe == mesh.world_size


@pytest.mark.parametrize(("world_size", "pipe", "data"), [(1, 1, 1), (8, 2, 4), (6, 6, 1), (6, 4, None), (2, 3, None)])
def test_pipelines_over_all_processes(world_size: int, pipe: int, data: int | None) -> None:
    mesh = Mesh.over(world_size, pipe=pipe)
    assert (mesh and mesh.data) == data
    if mesh is not None:
        assert mesh.world_size == world_size
        assert mesh.pipelines[0] == tuple(range(pipe))


def test_a_table_says_who_is_where() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    assert Mesh(pipe=2, data=2, tensor=2).table(hosts) == [
        "ranks  host  pipeline  stage  slices",
        "0-1    a     0         0      0-1",
        "2-3    a     0         1      0-1",
        "4-5    b     1         0      0-1",
        "6-7    b     1         1      0-1",
    ]
    assert Mesh(pipe=2, sequence=2, tensor=2).table(hosts) == [
        "ranks  host  pipeline  stage  tokens  slices",
        "0-1    a     0         0      0       0-1",
        "2-3    a     0         0      1       0-1",
        "4-5    b     0         1      0       0-1",
        "6-7    b     0         1      1       0-1",
    ]
    assert Mesh(tensor=3).table(["a", "a", "bc"])[1:] == [
        "0-1    a     0         0      0-1",
        "2      bc    0         0      2",
    ]


RANK = re.compile(r"(^|_)rank$")
STAGES = re.compile(r"^(pipe|pipe_parallel_size|num_stages)$")
SIZE = re.compile(rf"{STAGES.pattern}|^(world_size|data_parallel_size)$")
LAUNCHER = re.compile(r"train/distributed/launch\.py:\d+: rank\(\) == 0")
"""Before there is a mesh, a process asks the launcher's environment whether it is the first."""


def name_of(node: ast.AST | None) -> str:
    """The last name of `a.b.rank`, `rank` or `a.rank()`; empty for anything else."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def rank_arithmetic(source: str) -> list[str]:
    """Where a program works out, by itself, who a rank is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            is_division = isinstance(node.op, (ast.Mod, ast.FloorDiv))
            is_wrong = is_division and bool(RANK.search(name_of(node.left)) or STAGES.search(name_of(node.right)))
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            is_wrong = any(RANK.search(name_of(side)) for side in sides) and any(
                isinstance(side, ast.Constant) or SIZE.search(name_of(side)) for side in sides
            )
        elif isinstance(node, ast.Slice):
            is_wrong = any(SIZE.search(name_of(bound)) for bound in (node.lower, node.upper, node.step))
        else:
            is_wrong = False
        if is_wrong:
            found.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "stage = self.rank % layout.pipe",
        "first = agreement.rank == 0",
        "if launch.rank() != 0: pass",
        "copy = rank // pipe",
        "values[:pipe]",
        "values[:: self._layout.pipe]",
        "if rank < mesh.pipe: pass",
        "data = world_size // config.pipe_parallel_size",
    ],
)
def test_rank_arithmetic_is_seen(line: str) -> None:
    assert rank_arithmetic(line)


def test_only_the_mesh_knows_ranks() -> None:
    """Outside `jllm/parallel` nobody works out from a rank what it does."""
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if PACKAGE / "parallel" not in path.parents
        for line in rank_arithmetic(path.read_text(encoding="utf-8"))
    }
    assert [each for each in sorted(found) if not LAUNCHER.fullmatch(each)] == []
