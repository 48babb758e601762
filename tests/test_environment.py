"""The two lists of dependencies name the same packages with the same versions."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pip_requirements_of_environment_yml() -> set[str]:
    text = (ROOT / "environment.yml").read_text()
    listed = re.findall(r"^ {6}- (\S+)$", text.split("- pip:")[1], flags=re.MULTILINE)
    return set(listed)


def test_environment_yml_names_the_packages_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pip_requirements_of_environment_yml() == set(project["dependencies"])


def test_environment_yml_installs_the_project_itself():
    assert "- -e ." in (ROOT / "environment.yml").read_text()


def test_every_third_party_import_of_the_package_is_a_named_dependency():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    named = {re.split(r"[=<>]", line)[0] for line in dependencies}
    distribution = {
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "IPython": "ipykernel",
        "jupyter_client": "ipykernel",
        "nbformat": "papermill",
        "jinja2": "nbconvert",
        "pygments": "nbconvert",
    }
    imported = set()
    for module in (ROOT / "fma_nb").glob("*.py"):
        found = re.findall(r"^(?:from|import) (\w+)", module.read_text(), flags=re.MULTILINE)
        imported |= set(found)
    import sys

    third_party = {name for name in imported if name not in sys.stdlib_module_names and name != "fma_nb"}
    assert {distribution.get(name, name) for name in third_party} <= named
