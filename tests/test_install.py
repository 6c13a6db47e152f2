"""pyproject.toml and requirements.txt agree, and each script needs only the packages of its purpose."""

import re
import sys
import tomllib

from conftest import ROOT, TRAIN, execute, refused, save_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = {"trackio"}  # not in requirements.txt
BLOCKED = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
blocked = {names}
PathFinder.find_spec = staticmethod(
    lambda name, *where, **more: None if name.split(".")[0] in blocked else find(name, *where, **more)
)
"""


def requirements(lines):
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return requirements(line.split("#")[0] for line in lines if not line.startswith("#"))


def module_of(name):
    return {"huggingface-hub": "huggingface_hub", "lm-eval": "lm_eval", "pytest-xdist": "xdist"}.get(name, name)


def test_the_pinned_versions_are_in_the_ranges_of_pyproject():
    declared = requirements(PROJECT["dependencies"])
    for lines in EXTRAS.values():
        declared |= requirements(line for line in lines if not line.startswith(PROJECT["name"]))
    assert declared.keys() - OPTIONAL == pinned().keys()
    for name, requirement in pinned().items():
        versions = [each.version for each in requirement.specifier]
        assert len(versions) == (name != "huggingface-hub")
        assert all(version in declared[name].specifier for version in versions), name
        assert str(requirement.marker).replace("'", '"') == str(declared[name].marker).replace("'", '"')


def test_training_needs_no_test_tools():
    assert requirements(PROJECT["dependencies"]).keys() == {"torch", "numpy", "safetensors", "tqdm", "tyro"}
    everything = re.search(r"\[(.*)\]", EXTRAS["dev"][0])[1].split(",")
    assert set(everything) | OPTIONAL | {"dev"} == EXTRAS.keys()


def without(names, script, arguments, folder):
    """The result of a script where those packages are not installed."""
    (folder / "sitecustomize.py").write_text(BLOCKED.format(names=sorted(names)))
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return execute(command, folder, False, {"PYTHONPATH": f"{folder}:{ROOT}"})


def test_train_needs_only_the_base_dependencies(world, tmp_path):
    names = {module_of(name) for name in pinned().keys() - requirements(PROJECT["dependencies"]).keys()}
    names -= {"triton", "fsspec"}  # dependencies of torch
    assert {"tiktoken", "tokenizers", "huggingface_hub", "pytest", "wandb", "pyarrow"} <= names
    (tmp_path / "data").symlink_to(world / "data")
    result = without(names, "train.py", (*TRAIN, "--data", "data/small", "--steps", 2, "--run", "few"), tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_missing_package_is_an_error_with_the_command_to_install_it(world, tmp_path):
    save_model(tmp_path / "model", seed=1)
    result = without({"tiktoken"}, "sample.py", ("--ckpt", "model", "--device", "cpu"), tmp_path)
    assert refused(result) == "the package tiktoken is not installed. Run pip install tiktoken"
