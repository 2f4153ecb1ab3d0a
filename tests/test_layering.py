"""Imports run downwards only, and linen stays below the objectives."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "vlp_jax"

# A module may import from its own part and from those named here.
BELOW = {
    "infra": set(),
    "compress": {"infra"},
    "data": {"compress", "infra"},
    "models": {"compress", "infra"},
    "objectives": {"models", "data", "compress", "infra"},
    "transfer": {"objectives", "models", "data", "compress", "infra"},
    "evals": {"transfer", "objectives", "models", "data", "compress", "infra"},
    "train": {"evals", "transfer", "objectives", "models", "data", "compress", "infra"},
}
BELOW["main"] = {"train", *BELOW["train"]}
BELOW["predict"] = BELOW["main"]
EVERYWHERE = {"version", ""}  # "": the package itself

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to: vlp_jax.PART..."""
    return ([*module.split("."), ""])[1]


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that a source imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_downwards(file: pathlib.Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(ast.parse(file.read_text()))
    assert not {name for name in names if name.split(".")[0] in ("tests", "tools", "configs")}
    if part not in BELOW:
        assert part in ("__init__", "version"), f"give {part} its place in BELOW"
        return
    parts = {part_of(name) for name in names if name.split(".")[0] == "vlp_jax"}
    assert parts <= BELOW[part] | EVERYWHERE | {part}, f"{file.name} reaches upwards"


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_linen_lives_in_models(file: pathlib.Path) -> None:
    part = file.relative_to(PACKAGE).parts[0]
    tree = ast.parse(file.read_text())
    uses_linen = any(name.startswith("flax.linen") for name in imported(tree))
    if part == "models" or not uses_linen:
        return
    # Outside of models, a module may be run but not written.
    assert part in ("objectives", "evals", "transfer"), f"{file.name} imports flax.linen"
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "nn"
    }
    allowed = {"apply", "init", "init_with_output"}
    assert attributes <= allowed, f"{file.name} writes modules: {attributes - allowed}"
