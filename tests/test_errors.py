"""Errors cross processes: each class of the family comes back from pickle as it was, whatever its __init__ asks for."""

from __future__ import annotations

import inspect
import pickle

import pytest

from serve_app import errors


def family(root: type[errors.RaggedServeError] = errors.RaggedServeError) -> list[type[errors.RaggedServeError]]:
    return [root, *(member for child in root.__subclasses__() for member in family(child))]


@pytest.mark.parametrize("member", [m for m in family() if m.__module__ == errors.__name__], ids=lambda m: m.__name__)
def test_an_error_survives_pickle(member: type[errors.RaggedServeError]) -> None:
    # InvalidParameterError did not: pickle called its __init__ with the finished message alone.
    parameters = inspect.signature(member.__init__).parameters.values()
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name != "self"]
    arguments = ["x" * (i + 1) for i in range(len(named))] or ["a message"]
    error = member(*arguments)
    error.retry_after = 3  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is member
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert str(again)


def test_the_tree_in_the_docstring_names_every_member() -> None:
    tree = errors.__doc__ or ""
    for member in family():
        if member.__module__ == errors.__name__:
            assert member.__name__ in tree
            assert member.code in tree
