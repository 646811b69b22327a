"""Public functions that take arrays, or raise errors of the project, have a docstring."""

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ("jobs", "serving")
    for path in (ROOT / top).rglob("*.py")
)
ARRAYS = ("Tensor", "NDArray", "ndarray", "Array", "Logits", "State")  # and aliases of them
Function = ast.FunctionDef | ast.AsyncFunctionDef


def error_classes() -> set[str]:
    """The exceptions that the project defines, found by their bases."""
    bases: dict[str, set[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.ClassDef):
                names = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                bases.setdefault(node.name, set()).update(names)
    found = {"Exception", "ValueError", "RuntimeError"}
    while new := {name for name, of in bases.items() if of & found} - found:
        found |= new
    return found & bases.keys()


ERRORS = error_classes()


def functions(body: list[ast.stmt], where: str = "") -> Iterator[tuple[str, Function]]:
    """Public functions and methods; not those of protocols, inside functions, or `forward`."""
    for node in body:
        if isinstance(node, Function) and node.name[0] != "_" and node.name != "forward":
            yield f"{where}{node.name}", node
        elif isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
            yield from functions(node.body, f"{node.name}.")


def own(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function's body, without the functions that it defines."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from own(child)


def handles_arrays(function: Function) -> bool:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [a.annotation for a in every] + [function.returns]
    named = {
        part.id if isinstance(part, ast.Name) else part.attr
        for annotation in annotations
        if annotation is not None
        for part in ast.walk(annotation)
        if isinstance(part, ast.Name | ast.Attribute)
    }
    return not named.isdisjoint(ARRAYS)


def raises_ours(function: Function) -> bool:
    raised = (n.exc for n in own(function) if isinstance(n, ast.Raise) and n.exc is not None)
    called = (exc.func if isinstance(exc, ast.Call) else exc for exc in raised)
    return any(ast.unparse(exc).rpartition(".")[2] in ERRORS for exc in called)


def undocumented(source: str) -> list[str]:
    return [
        name
        for name, function in functions(ast.parse(source).body)
        if (handles_arrays(function) or raises_ours(function)) and not ast.get_docstring(function)
    ]


def test_the_errors_of_the_project_are_found() -> None:
    assert {"UnavailableError", "Divergence", "ExportError", "Conflict", "ModelError"} <= ERRORS
    assert {"ImageError", "RequestError", "SettingsError", "ClientError"} <= ERRORS


@pytest.mark.parametrize("module", MODULES)
def test_functions_on_arrays_and_those_that_raise_have_a_docstring(module: str) -> None:
    assert not undocumented((ROOT / module).read_text())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(x: Tensor): return x", ["f"]),
        ("def f() -> dict[str, NDArray[Any]]: ...", ["f"]),
        ("class A:\n  def g(self):\n    if 1:\n      raise errors.ModelError('no')", ["A.g"]),
        ("def f(x: Tensor):\n  '''float32 [N].'''", []),
        ("def f():\n  raise KeyError", []),
        ("def _f(x: Tensor): ...\ndef g(x: int): ...", []),
        ("class P(Protocol):\n  def f(self, x: Tensor): ...", []),
    ],
)
def test_the_rule_finds_what_it_should(source: str, names: list[str]) -> None:
    assert undocumented(source) == names
