"""Imports point downwards: a module imports only from its own layer and those below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = "vllm_cfg_plugin"
ROOT = Path(__file__).parents[2] / PACKAGE

# From top to bottom. A name is a module or a folder of the package.
LAYERS = (
    ("plugin",),
    ("entrypoints",),
    ("executor",),
    ("worker",),
    ("engine", "memory"),
    ("platform", "cli", "model"),
    ("vllm_options",),
    ("config", "resolve", "tokens", "field_checks", "lora_field"),
    ("pipelines",),
    ("distributed", "checkpoint"),
    ("params", "guidance", "errors", "compat", "logs"),
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
# Of `pipelines`, from top to bottom: the families, what they share, the contract.
PIPELINES = {
    "common": 1,
    "registry": 2,
    "noise_scheduler": 2,
    "base": 2,
    "sample_request": 2,
    "adapter_files": 2,
    "adapter_reader": 2,
    "components": 3,
    "adapters": 3,
    "offload": 4,
    "quantized": 5,
    "weight_files": 4,
}


def imports(tree):
    """(line, module) of every import of the package, wherever it stands in the file; dots first if it is relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith(f"{PACKAGE}."))


def place(parts):
    """(layer, layer inside of `pipelines`, family) of a module; a larger number is further down."""
    inner = PIPELINES.get(parts[1], 0) if parts[0] == "pipelines" and len(parts) > 1 else 0
    family = parts[1] if parts[0] == "pipelines" and len(parts) > 1 and not inner else ""
    return DEPTH[parts[0]], inner, family


def wrong_ways():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        layer, inner, family = place(parts)
        for line, module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if module.startswith("."):  # whose layer can't be seen at a glance
                yield f"{path.relative_to(ROOT)}:{line} imports the relative {module}"
                continue
            target_layer, target_inner, target_family = place(module.split(".")[1:])
            is_up = (target_layer, target_inner) < (layer, inner)
            is_across = family and target_family and family != target_family
            if is_up or is_across:
                yield f"{path.relative_to(ROOT)}:{line} imports {module}"


def test_every_module_has_a_layer():
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert names - {"__init__"} == set(DEPTH)


def test_imports_point_downwards():
    assert list(wrong_ways()) == []


@pytest.mark.parametrize(
    ("imported", "seen"),
    [
        (f"{PACKAGE}.worker", f"{PACKAGE}.worker"),
        ("..worker", "the relative ..worker"),
        ("..", "the relative .."),
        (".", "the relative ."),
    ],
)
def test_the_check_sees_an_import_that_points_up_or_is_relative(tmp_path, monkeypatch, imported, seen):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "plan.py").write_text(f"def f():\n    from {imported} import runner\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(wrong_ways()) == [f"engine/plan.py:2 imports {seen}"]
