"""Laws of the house itself: who may import whom, what is never called, and how soon a command answers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("mmit", "data_tools") for path in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imported(name: str) -> Iterator[tuple[str, int]]:
    """Every module of ours that a module imports, inside functions and for type checking too, with its line."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                start = ".".join([*parents, *([node.module] if node.module else [])])
            whole = [f"{start}.{alias.name}" for alias in node.names]
            found = [item if item in MODULES else start for item in whole]
        for item in found:
            if item.split(".")[0] in ("mmit", "data_tools"):
                yield item, getattr(node, "lineno", 0)


def below(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


MAY_KNOW_ALL = ("mmit", "mmit.api", "mmit.cli", "mmit.__main__", "mmit.demo")
FORBIDDEN = {
    # importer: what it must not import
    "mmit.config": ("mmit", "data_tools"),
    "mmit.data.sample": ("mmit", "data_tools"),
    "mmit.data": ("mmit.model", "mmit.training", "mmit.inference", "mmit.export", "mmit.evaluation"),
    "mmit.model": ("mmit.training", "mmit.inference", "mmit.export", "mmit.evaluation"),
    # A run says before step 0 what will load its result, and answers held-out questions while it trains: so training
    # may ask those rooms, and none of them ever imports training.
    "mmit.inference": ("mmit.training", "mmit.export", "mmit.evaluation"),
    "mmit.export": ("mmit.training",),
    "mmit.evaluation": ("mmit.training",),
}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    wrong = []
    for target, line in imported(name):
        walls = [(room, rooms) for room, rooms in FORBIDDEN.items() if below(name, room)]
        if any(below(target, *rooms) and not below(target, room) for room, rooms in walls):
            wrong.append(f"{name}:{line} imports {target}")
        if below(name, "mmit") and name not in MAY_KNOW_ALL and below(target, "data_tools"):
            wrong.append(f"{name}:{line} imports {target}: data_tools stands on mmit, never the reverse")
        if name not in MAY_KNOW_ALL and below(target, "mmit.api", "mmit.cli"):
            wrong.append(f"{name}:{line} imports {target}, which stands above it")
        if below(name, "data_tools") and not below(
            target, "data_tools", "mmit.data", "mmit.config", "mmit.inference", "mmit.evaluation"
        ):
            wrong.append(f"{name}:{line} imports {target}; data_tools knows mmit.data and mmit.inference")
    assert wrong == []


def test_pictures_are_decoded_without_knowledge_of_anything_but_what_a_fault_is() -> None:
    assert {target for target, _ in imported("mmit.data.images")} <= {"mmit.data.sample"}


def test_model_knows_of_data_only_types_and_the_chat_it_is_assembled_with() -> None:
    known = {target for name in MODULES if below(name, "mmit.model") for target, _ in imported(name)}
    loaded = {target for target in known if below(target, "mmit.data")}
    assert not {target for target in loaded if below(target, "mmit.data.loader", "mmit.data.order", "mmit.data.shards")}


def test_no_import_leads_back_to_where_it_came_from() -> None:
    """Among imports that run when a module is imported."""
    runs: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        top = ast.parse(path.read_text(encoding="utf-8")).body
        lines = {node.lineno for node in top if isinstance(node, ast.Import | ast.ImportFrom)}
        runs[name] = {target for target, line in imported(name) if line in lines and target in MODULES} - {name}
    seen: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert seen.get(name) != "open", f"a circle of imports: {' -> '.join((*path, name))}"
        if name not in seen:
            seen[name] = "open"
            for target in sorted(runs[name]):
                visit(target, (*path, name))
            seen[name] = "done"

    for name in runs:
        visit(name, ())


def test_no_module_is_a_drawer_for_anything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
    assert [name for name in MODULES if set(name.split(".")) & drawers] == []


# No code in data ----------------------------------------------------------------------------------------------------


def dangers(source: str) -> list[str]:
    """What in a source could run code that came as data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                    found.append(f"{node.lineno}: imports {name}")
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "yaml"):
                found += [f"{node.lineno}: from {node.module} import load" for a in node.names if a.name == "load"]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: word.value for word in node.keywords}

        def is_true(name: str, given: dict[str | None, ast.expr] = given) -> bool:
            return isinstance(value := given.get(name), ast.Constant) and value.value is True

        if called == "torch.load" and not is_true("weights_only"):
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
            found.append(f"{node.lineno}: {called}")
        if called in ("eval", "exec", "os.system", "os.popen", "np.load", "numpy.load") and not (
            called.endswith(".load") and isinstance(v := given.get("allow_pickle"), ast.Constant) and v.value is False
        ):
            found.append(f"{node.lineno}: {called}")
        if called.rpartition(".")[2] in ("extractall", "unpack_archive"):
            found.append(f"{node.lineno}: {called}")
        if "shell" in given and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False):
            found.append(f"{node.lineno}: shell=")
        if is_true("trust_remote_code"):
            found.append(f"{node.lineno}: trust_remote_code=True")
        if is_true("allow_pickle"):
            found.append(f"{node.lineno}: allow_pickle=True")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_no_data_can_run_as_code(name: str) -> None:
    assert dangers(MODULES[name].read_text(encoding="utf-8")) == []


def test_the_gate_sees_what_it_should() -> None:
    bad = [
        "import pickle",
        "from joblib import load",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "from torch import load",
        "yaml.load(x, Loader=yaml.Loader)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "tar.extractall(x)",
        "shutil.unpack_archive(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "eval(x)",
        "os.system(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
    ]
    assert [source for source in bad if not dangers(source)] == []
    good = ["torch.load(x, weights_only=True)", "yaml.safe_load(x)", "subprocess.run(x)", "model.eval()"]
    assert [source for source in good if dangers(source)] == []


CONSIDERED = {"mmit.data.images": 1}
"""Handlers of any exception that do not raise, by module: damaged EXIF in a good picture, read as no EXIF."""


def test_no_fault_is_swallowed() -> None:
    wrong, broad_ones = [], dict.fromkeys(CONSIDERED, 0)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                if node.type is None:
                    wrong.append(f"{name}:{node.lineno}: bare except")
                broad = node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
                kept = [inner.value for inner in node.body if isinstance(inner, ast.Assign)]  # and raised below
                keeps = any(isinstance(value, ast.Name) and value.id == node.name for value in kept)
                if broad and not keeps and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                    broad_ones[name] = broad_ones.get(name, 0) + 1
    assert wrong == []
    assert broad_ones == CONSIDERED


# Commands and the package -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["mmit.cli", "data_tools.cli"])
def test_help_loads_nothing_heavy(command: str) -> None:
    program = (
        f"import sys, json\nfrom {command} import main\nsys.argv = ['x', '--help']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    code = ended.code\n"
        "print('\\n' + json.dumps([code or 0, sorted(sys.modules)]))"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    print(f"{command} --help: {time.monotonic() - began:.2f} s")
    code, loaded = json.loads(ended.stdout.splitlines()[-1])
    assert code == 0
    heavy = {"torch", "transformers", "pyarrow", "numpy", "PIL", "open_clip", "peft", "accelerate", "matplotlib"}
    assert heavy & set(loaded) == set()


def test_the_tools_of_the_data_start_without_torch() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "data_tools").rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    program = f"import importlib, sys\n[importlib.import_module(n) for n in {names}]\nprint('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.strip() == "False", "importing it takes seconds, once in each process of a conversion"


def test_the_core_depends_on_few_libraries_by_floors() -> None:
    needed = PROJECT["dependencies"]
    assert len(needed) <= 20
    extras = [item for group in PROJECT["optional-dependencies"].values() for item in group]
    for requirement in [*needed, *extras]:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?>=[0-9.]+|mmit\[[a-z,]+\]", requirement), requirement


def test_what_modules_import_at_their_top_is_what_the_project_names() -> None:
    """What a single format or command needs may be imported inside it, with a message that names the extra."""
    distributions = {"yaml": "pyyaml", "PIL": "pillow", "open_clip": "open_clip_torch"}
    known = {re.split(r"[>\[]", requirement)[0].lower() for requirement in PROJECT["dependencies"]}
    # transformers hands out objects of the first two, torch needs the third, the faults of pydantic are the fourth's.
    known |= {"tokenizers", "huggingface_hub", "jinja2", "pydantic_core"} | {
        name.lower() for name in sys.stdlib_module_names
    }
    unknown = set()
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                tops = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = [(node.module or "").split(".")[0]]
            else:
                continue
            unknown |= {
                (name, top)
                for top in tops
                if top not in ("mmit", "data_tools") and distributions.get(top, top).lower() not in known
            }
    assert unknown == set()


def test_the_wheel_carries_both_packages_and_the_recipes() -> None:
    assert set(BUILD["targets"]["wheel"]["packages"]) == {"mmit", "data_tools"}
    assert BUILD["targets"]["wheel"]["force-include"] == {"configs": "mmit/configs"}
    assert PROJECT["scripts"] == {"mmit": "mmit.cli:main", "mmit-data": "data_tools.cli:main"}
    assert not (ROOT / "mmit" / "configs").exists()
