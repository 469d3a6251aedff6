"""The names of `import jaxrec`: all there, typed, imported when they are used, and none of a module beside them."""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrec

HEAVY = ("click", "duckdb", "jax", "matplotlib", "numpy", "pandas")


@pytest.mark.parametrize("name", jaxrec.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(jaxrec, name) is not None
    assert name in dir(jaxrec)


def test_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(jaxrec.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
    assert {*typed, "__version__"} == set(jaxrec.__all__)
    entries = [(module, *entry.partition("=")) for module, names in jaxrec._WHERE.items() for entry in names]
    assert typed == {name: (module, there or name) for module, name, _, there in entries}


def test_importing_jaxrec_loads_nothing() -> None:
    program = f"import sys, jaxrec; dir(jaxrec); print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_configurations_and_errors_need_no_jax() -> None:
    program = (
        "import sys, jaxrec\n"
        "jaxrec.PrepareConfig(rating_scale=jaxrec.RatingScale(1, 5)), jaxrec.ModelConfig(), jaxrec.TrainConfig()\n"
        "jaxrec.DataError, jaxrec.TrainingError, jaxrec.ExportError, jaxrec.__version__\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_no_module_has_the_name_of_a_public_object() -> None:
    modules = {module.name for module in pkgutil.iter_modules(jaxrec.__path__)}
    assert modules.isdisjoint(jaxrec.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'jaxrec' has no attribute 'trian'"):
        _ = jaxrec.trian


@pytest.mark.parametrize("package", ["jaxrec", "serve"])
def test_both_packages_are_typed(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()
