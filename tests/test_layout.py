"""The layout of the code: imports go in one direction, functions and files are short, and sys.path is unchanged."""

import ast

import pytest
from conftest import ROOT

MAX_FUNCTION_LINES, MAX_FILE_LINES = 50, 350
PATTERNS = ("*.py", "core/**/*.py", "demo/**/*.py", "benchmarks/**/*.py")
SOURCES = {str(path.relative_to(ROOT)): path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"model"}
FIRST_PARTY = {"core", "demo", "benchmarks", "model", *SCRIPTS}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=path)


def top_level(tree):
    """The nodes that run at import time: neither in functions nor under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        is_type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_type_checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from top_level(node)


def imports(file, nodes):
    """The modules of this project that the nodes import, in full: `from core import cli` is core.cli."""
    package = file.removesuffix(".py").split("/")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in FIRST_PARTY)


def violations(files, is_allowed, nodes=ast.walk):
    """The imports of the files that are not allowed, as `file: module`."""
    found = [(file, name) for file in files for name in imports(file, nodes(parse(SOURCES[file])))]
    return [f"{file}: {name}" for file, name in found if not is_allowed(name)]


def is_in(name, *packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def core_files(*folders):
    return [file for file in SOURCES if file.rsplit("/", 1)[0] in folders]


def test_imports_are_found_in_every_form():
    code = """
import core.data.shards, numpy
from core import cli
from core.train.recipe import Recipe as R
from .optim import adamw
from .. import files
if TYPE_CHECKING:
    from model import GPT
def later():
    import train
class C:
    from demo import stories
try:
    import report
except ImportError:
    pass
"""
    at_import = ["core.data.shards", "core.cli", "core.train.recipe.Recipe", "core.train.optim.adamw", "core.files"]
    at_import += ["demo.stories", "report"]
    tree = ast.parse(code)
    assert sorted(imports("core/train/setup.py", top_level(tree))) == sorted(at_import)
    assert sorted(imports("core/train/setup.py", ast.walk(tree))) == sorted([*at_import, "model.GPT", "train"])


def test_scripts_import_core_and_model_and_not_each_other():
    scripts = [f"{name}.py" for name in sorted(SCRIPTS)]
    assert {"train.py", "fineweb.py", "sample.py", "report.py", "eval_lambada.py"} <= set(scripts)
    assert not violations([s for s in scripts if s != "report.py"], lambda name: is_in(name, "core", "model"))
    assert not violations(["report.py"], lambda name: is_in(name, "core", "model", "demo"))


def test_model_imports_only_the_operators():
    assert not violations(["model.py"], lambda name: is_in(name, "core.ops"), top_level)
    assert not violations(["model.py"], lambda name: is_in(name, "core.ops", "core.convert"))


def test_operators_do_not_import_the_rest_of_the_project():
    assert not violations(core_files("core/ops"), lambda name: is_in(name, "core.ops"), top_level)


def test_data_evaluation_and_shared_code_do_not_import_training():
    files = core_files("core", "core/data", "core/eval", "core/ops")
    assert {"core/cli.py", "core/data/shards.py", "core/eval/evaluate.py", "core/ops/__init__.py"} <= set(files)
    assert not violations(files, lambda name: not is_in(name, "core.train"))


def test_core_and_demo_import_no_script():
    core = [file for file in SOURCES if file.startswith("core/")]
    demo = [file for file in SOURCES if file.startswith("demo/")]
    assert "core/train/setup.py" in core and "demo/stories.py" in demo
    assert not violations(core, lambda name: is_in(name, "core", "model"))
    assert not violations(demo, lambda name: is_in(name, "core", "model", "demo"))


def functions(tree):
    """Each function with its number of lines, decorators excluded."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("file", SOURCES)
def test_functions_and_files_are_short(file):
    lines = len(SOURCES[file].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{file} has {lines} lines"
    long = [f"{name}: {lines}" for name, lines in functions(parse(SOURCES[file])) if lines > MAX_FUNCTION_LINES]
    assert not long, f"{file} has functions of more than {MAX_FUNCTION_LINES} lines: {', '.join(long)}"


def sys_path_edits(tree):
    """The lines that assign to sys.path, to an item of it, or call one of its methods."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            yield from (node.lineno for target in targets if ast.unparse(target).startswith("sys.path"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path."):
            yield node.lineno


def test_sys_path_is_not_edited():
    examples = ["sys.path[0] = 'x'", "sys.path[:] = []", "sys.path += ['x']", "del sys.path[0]"]
    examples.append("sys.path.insert(0, 'x')")
    assert [list(sys_path_edits(ast.parse(example))) for example in examples] == [[1]] * len(examples)
    assert not list(sys_path_edits(ast.parse("print(sys.path[0], sys.path)")))
    files = SOURCES | {f"tests/{path.name}": path for path in ROOT.glob("tests/*.py")}
    del files["tests/processes.py"]  # sets the path of a new process
    assert not [f"{file}:{line}" for file, path in files.items() for line in sys_path_edits(parse(path))]
