"""The list of faults that tests must see is one of the sources and of the tests as they are."""

import ast

import pytest
from mutations import MUTATIONS, REPOSITORY, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.fault}")
def test_every_fault_can_be_put_into_the_sources_and_has_a_test(mutation: Mutation) -> None:
    """The snippet stands in its file exactly once, Python accepts what takes its place, and the test named exists."""
    ast.parse(mutated((REPOSITORY / mutation.file).read_text(), mutation))
    file, name = mutation.test.split("[")[0].split("::")
    tree = ast.parse((REPOSITORY / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{mutation.test} is no test"
