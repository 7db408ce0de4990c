# SPDX-License-Identifier: Apache-2.0
"""The rules of structure in CONTRIBUTING.md, read off the syntax trees so that nothing has to be imported.

Each rule is a function from source text to a list of complaints; the first half of the tests runs them over the
repository, the second half feeds each one a small string that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lora_megatron"
LONGEST_FILE = 300

# Low to high; a module may import what stands in an earlier row, or its own package. Names in one row are siblings.
LEVELS = (
    ("without_compiler",),
    ("",),  # the package's own __init__
    ("errors",),
    ("strict_json",),
    ("config", "strict_safetensors"),
    ("parallel",),
    ("layers",),
    ("methods",),
    ("model",),
    ("checkpoint", "data", "measure", "metrics"),
    ("huggingface",),
    ("training", "evaluation", "planning"),
    ("bench",),
    ("commands", "quickstart"),
    ("arguments",),
    ("__main__",),
)
LEVEL_OF = {name: level for level, row in enumerate(LEVELS) for name in row}
DATA_PREP_LEVEL = LEVEL_OF["training"]  # prepares files for lora_megatron.data: may use all that training may
NEVER_IMPORTS = {"layers": {"config"}}  # layers take numbers and callables, so they stay usable without our YAML
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
CODE_RUNNING_FORMATS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def python_files(*folders: str) -> list[Path]:
    """Every .py file of the given top-level folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """lora_megatron/layers/lora.py -> lora_megatron.layers.lora; a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area(module: str) -> str:
    """The part of a dotted name that has a level: lora_megatron.layers.lora -> layers; the root itself -> ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import at any depth; `from a import b` yields a and a.b, as b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def level_complaints(module: str, source: str) -> list[str]:
    """Imports that are relative, go up or sideways, or are named in NEVER_IMPORTS."""
    own_area = area(module)
    if module.startswith(PACKAGE) and own_area and own_area not in LEVEL_OF:
        return [f"{module}: '{own_area}' has no level: add it to LEVELS in tests/test_architecture.py"]
    own_level = DATA_PREP_LEVEL if not module.startswith(PACKAGE) else LEVEL_OF.get(own_area, 0)
    complaints = []
    for line, target in imported_modules(source):
        where = f"{module}:{line} imports {target}"
        if target.startswith("."):
            complaints.append(f"{where}: relative")
        if target.split(".")[0] == "data_prep" and module.startswith(PACKAGE):
            complaints.append(f"{where}: the library does not know data_prep")
        target_area = area(target)
        if target.split(".")[0] != PACKAGE or target_area not in LEVEL_OF or target_area == own_area:
            continue
        if LEVEL_OF[target_area] >= own_level:
            complaints.append(f"{where}: level {LEVEL_OF[target_area]} from level {own_level}")
        if target_area in NEVER_IMPORTS.get(own_area, ()):
            complaints.append(f"{where}: {own_area} never imports {target_area}")
    return complaints


def import_cycle(sources: dict[str, str]) -> list[str]:
    """One cycle among the modules as a list of names, or []. Imports inside functions count: they only hide a cycle."""
    graph = {
        module: sorted({name for _, name in imported_modules(source) if name in sources and name != module})
        for module, source in sources.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return []
        for target in graph[module]:
            if cycle := visit(target, [*trail, module]):
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def unsafe_calls(module: str, source: str) -> list[str]:
    """Whatever could run code out of a file: pickle and its kin, torch.load, yaml.load, np.load with pickles, eval."""
    complaints = [
        f"{module}:{line} imports {name}"
        for line, name in imported_modules(source)
        if name.split(".")[0] in CODE_RUNNING_FORMATS
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (
            name in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False")
        )
        if unsafe:
            complaints.append(f"{module}:{node.lineno} calls {ast.unparse(node)}")
    return complaints


def file_complaints(name: str, source: str) -> list[str]:
    """The licence line, the length, and a name that says what is inside."""
    complaints = []
    if source.partition("\n")[0] != "# SPDX-License-Identifier: Apache-2.0":
        complaints.append(f"{name}: the first line is not '# SPDX-License-Identifier: Apache-2.0'")
    if (length := source.count("\n")) > LONGEST_FILE:
        complaints.append(f"{name}: {length} lines, more than {LONGEST_FILE}: split it")
    if VAGUE_NAMES & set(Path(name).with_suffix("").parts):
        complaints.append(f"{name}: name it after what it does")
    return complaints


SHIPPED = {module_name(path): path.read_text(encoding="utf-8") for path in python_files(PACKAGE, "data_prep")}


def test_there_is_something_to_check() -> None:
    assert f"{PACKAGE}.errors" in SHIPPED


def test_imports_go_down_levels() -> None:
    assert [complaint for item in SHIPPED.items() for complaint in level_complaints(*item)] == []


def test_no_module_imports_itself_through_others() -> None:
    assert import_cycle(SHIPPED) == []


def test_nothing_runs_code_out_of_a_file() -> None:
    assert [complaint for item in SHIPPED.items() for complaint in unsafe_calls(*item)] == []


def test_every_file_is_licensed_short_and_named() -> None:
    paths = [ROOT / "setup.py", *python_files(PACKAGE, "data_prep", "tests", "launch")]
    names = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    assert [complaint for item in names.items() for complaint in file_complaints(*item)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lora_megatron.layers.lora", "from lora_megatron.model import build"),
        ("lora_megatron.layers.lora", "def f():\n    from lora_megatron.training import loop"),
        ("lora_megatron.layers.lora", "import lora_megatron.config"),
        ("lora_megatron.layers.lora", "from lora_megatron import config"),
        ("lora_megatron.layers.lora", "from .column import Column"),
        ("lora_megatron.layers.lora", "from . import column"),
        ("lora_megatron.data.rows", "from lora_megatron.checkpoint import manifest"),
        ("lora_megatron.errors", "import lora_megatron.config"),
        ("lora_megatron.data.rows", "import data_prep.e2e"),
        ("lora_megatron.novelty.thing", "import torch"),
        ("data_prep.e2e", "from lora_megatron.training import loop"),
    ],
)
def test_an_import_that_goes_up_sideways_or_nowhere_is_found(module: str, source: str) -> None:
    assert level_complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "lora_megatron.layers.lora",
            "import torch\nfrom lora_megatron.layers import qkv\nimport lora_megatron.errors",
        ),
        ("lora_megatron.__main__", "from lora_megatron import __version__\nfrom lora_megatron.quickstart import run"),
        ("data_prep.e2e", "from lora_megatron.data import parquet"),
    ],
)
def test_an_import_that_goes_down_is_not(module: str, source: str) -> None:
    assert level_complaints(module, source) == []


def test_a_cycle_hidden_in_a_function_is_found() -> None:
    sources = {"p.a": "import p.b", "p.b": "from p import c", "p.c": "def f():\n    from p.a import x"}
    assert import_cycle(sources) == ["p.a", "p.b", "p.c", "p.a"]
    assert import_cycle({**sources, "p.c": "import torch"}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "def f():\n    exec(text)",
    ],
)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert unsafe_calls("m", source)


def test_a_safe_call_is_not() -> None:
    source = "model.eval()\ntorch.load(path, weights_only=True)\nyaml.safe_load(text)\nnp.load(path)"
    assert unsafe_calls("m", source) == []


def test_a_file_without_licence_too_long_or_vague_is_found() -> None:
    licence = "# SPDX-License-Identifier: Apache-2.0\n"
    assert file_complaints("a/lora.py", licence) == []
    assert file_complaints("a/lora.py", "import torch\n")
    assert file_complaints("a/lora.py", licence + "\n" * LONGEST_FILE)
    assert file_complaints("a/utils.py", licence)
    assert file_complaints("a/common/lora.py", licence)
