"""The layers: launch -> models -> kvjax -> pallas_kernels, and a library that starts no backend."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("pallas_kernels", "kvjax", "models", "launch")  # lowest first
LIBRARY = LAYERS[:-1]


def files(package):
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


def imports_of(tree, module, is_package):
    """(line, absolute dotted name) of every import statement, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                parts = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def upward(source, module, is_package=False):
    """Imports in `source` of layers above the one that `module` belongs to."""
    above = LAYERS[LAYERS.index(module.split(".")[0]) + 1 :]
    found = imports_of(ast.parse(source), module, is_package)
    return sorted({(line, name) for line, name in found if name.split(".")[0] in above})


@pytest.mark.parametrize("package", LIBRARY)
def test_a_lower_layer_never_imports_a_higher_one(package):
    bad = []
    for path in files(package):
        relative = path.relative_to(ROOT).with_suffix("")
        is_package = relative.name == "__init__"
        module = ".".join(relative.parts[:-1] if is_package else relative.parts)
        bad += [
            f"{path.relative_to(ROOT)}:{n} {name}" for n, name in upward(path.read_text(), module, is_package)
        ]
    assert not bad


def test_the_import_check_sees_every_form():
    assert upward("import models.llama", "kvjax.cache.dense") == [(1, "models.llama")]
    assert upward("def f():\n    from launch import eval", "models.load")[0] == (2, "launch")
    assert upward("from kvjax import types", "pallas_kernels.ops")
    assert not upward("import kvjax.types\nimport pallas_kernels", "models.llama")
    assert not upward("from . import dense\nfrom ..types import Array", "kvjax.cache.ragged")
    assert imports_resolve("from ..types import Array", "kvjax.cache.ragged") == "kvjax.types"


def imports_resolve(source, module):
    return next(imports_of(ast.parse(source), module, False))[1]


def device_queries(source):
    """Lines that ask jax which devices exist."""
    names = {"devices", "local_devices", "device_count", "local_device_count"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (
            isinstance(node, ast.Attribute)
            and node.attr in names
            and isinstance(node.value, ast.Name)
            and node.value.id == "jax"
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "jax"
            and names & {alias.name for alias in node.names}
        )
    ]


@pytest.mark.parametrize("package", LIBRARY)
def test_library_code_never_asks_for_devices(package):
    bad = [f"{p.relative_to(ROOT)}:{n}" for p in files(package) for n in device_queries(p.read_text())]
    assert not bad
    assert device_queries("import jax\nn = len(jax.devices())") == [2]
    assert device_queries("from jax import devices") == [1]


def environment_reads(source):
    """Lines that read environment variables."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]


@pytest.mark.parametrize("package", LIBRARY)
def test_library_code_reads_no_environment_variables(package):
    bad = [f"{p.relative_to(ROOT)}:{n}" for p in files(package) for n in environment_reads(p.read_text())]
    assert not bad
    assert environment_reads("import os\nx = os.environ.get('A')") == [2]


@pytest.mark.parametrize("module", ["kvjax.policies", "kvjax.generation", "kvjax.cache", "pallas_kernels"])
def test_importing_the_library_starts_no_backend_and_loads_no_upper_layer(module):
    code = (
        f"import {module}, sys\n"
        "from jax._src import xla_bridge\n"
        "print(sorted(xla_bridge._backends), sorted(m for m in sys.modules if m.split('.')[0] in "
        f"{tuple(LAYERS[LAYERS.index(module.split('.')[0]) + 1 :])!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"
