"""The plan of the source: which folder may import which, and what may stand in one place only."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS, CONVERSION = "megatron_policysplit", "checkpoints_conv"
SOURCES = sorted(path for name in (OURS, CONVERSION) for path in (ROOT / name).rglob("*.py"))
# The command line of the conversion package is that of `policysplit convert`: the one import that goes up.
COMMAND_LINE = ROOT / CONVERSION / "__main__.py"

# From the ground up. A folder imports what stands on lower floors, and nothing beside or above it.
FLOORS = (
    {CONVERSION},
    {"errors", "rows", "vocab_parallel"},
    {"config", "distributed", "files"},
    {"algorithms", "data", "logs"},
    {"actor", "reports", "rewards"},
    {"rollout", "study"},
    {"evaluation", "serving"},
    {"weight_sync"},
    {"doctor", "training"},
    {"cli"},
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}

DEVICE_MODULES = {
    ROOT / OURS / "distributed" / "device.py",
    ROOT / OURS / "actor" / "megatron_on_cpu.py",
}
# Asking which device there is; device.backend(), training_device() and the like only pass its answers on.
DEVICE_QUESTION = re.compile(
    r"cuda\.is_available|cuda\.device_count|\bhas_cuda\b|\.is_cuda\b|\bdevice\.type\b|get_device_name|\bon_cpu\b"
)


def name(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


@cache
def tree(path):
    return ast.parse(path.read_text())


def modules_named(node):
    """The modules that an import statement names; relative imports are refused."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "a relative import"
    submodules = [f"{node.module}.{alias.name}" for alias in node.names]
    inside = [module for module in submodules if module in MODULES]
    return inside if len(inside) == len(submodules) else [node.module, *inside]


def imported(path):
    """Every module a file imports, anywhere in it: in functions and under TYPE_CHECKING too."""
    statements = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {module for node in statements for module in modules_named(node)}


def imported_at_module_level(path):
    """What a file imports outside of functions, under TYPE_CHECKING too."""
    found, bodies = set(), [tree(path).body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.update(modules_named(node))
            elif isinstance(node, ast.If | ast.Try):
                bodies += [node.body, node.orelse]
    return found


def folder_of(module):
    """The folder of ours that a module stands in; None for other packages and for the package itself."""
    first, _, rest = module.partition(".")
    if first == CONVERSION:
        return CONVERSION
    return rest.split(".")[0] or None if first == OURS else None


def is_of(module, package):
    return module == package or module.startswith(package + ".")


def code_without_docstrings(path):
    """The source as code alone, so that prose may speak of devices."""
    source = ast.parse(path.read_text())
    for node in ast.walk(source):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value = ast.Constant(value=None)
    return ast.unparse(source)


def test_every_folder_has_a_floor():
    folders = {folder_of(module) for module in MODULES} - {None}
    assert folders == set(FLOOR)


def test_imports_point_down():
    upward = [
        f"{name(path)} ({folder}) imports {module}"
        for module_name, path in MODULES.items()
        if path != COMMAND_LINE and (folder := folder_of(module_name)) is not None
        for module in sorted(imported(path))
        if (target := folder_of(module)) not in (None, folder) and FLOOR[target] >= FLOOR[folder]
    ]
    assert not upward


def test_no_modules_import_each_other():
    """At module level, under TYPE_CHECKING too; a circle is named by the modules on it."""
    reached = {module: imported_at_module_level(path) & set(MODULES) - {module} for module, path in MODULES.items()}
    grown = True
    while grown:  # the transitive closure
        grown = False
        for module, targets in reached.items():
            more = set().union(*(reached[target] for target in targets)) - targets
            grown = grown or bool(more)
            reached[module] = targets | more
    assert not sorted(module for module, targets in reached.items() if module in targets)


def test_only_two_modules_ask_for_the_device():
    questions = {path: DEVICE_QUESTION.findall(code_without_docstrings(path)) for path in SOURCES}
    assert all(questions[path] for path in DEVICE_MODULES)
    assert not [f"{name(path)}: {said}" for path, said in questions.items() if said and path not in DEVICE_MODULES]


def test_the_device_question_is_recognised():
    assert DEVICE_QUESTION.search("if torch.cuda.is_available():")
    assert DEVICE_QUESTION.search("x = on_cpu()")
    assert DEVICE_QUESTION.search("if tensor.is_cuda:")
    assert not DEVICE_QUESTION.search("backend(); training_device(); torch.device('cpu')")


def test_megatron_stays_in_the_actor():
    actor = ROOT / OURS / "actor"
    users = [path for path in SOURCES if any(is_of(module, "megatron") for module in imported(path))]
    assert users and not [name(path) for path in users if actor not in path.parents]


def test_rollouts_and_servers_know_nothing_of_the_actor():
    """Nor of what stands beside it: what they need of a rank is in distributed/."""
    wing = [path for path in SOURCES if {ROOT / OURS / "rollout", ROOT / OURS / "serving"} & set(path.parents)]
    assert len(wing) >= 20
    assert not [name(path) for path in wing if any(folder_of(module) == "actor" for module in imported(path))]


def test_conversion_imports_nothing_of_ours():
    alone = [path for path in SOURCES if ROOT / CONVERSION in path.parents and path != COMMAND_LINE]
    assert not [name(path) for path in alone if any(is_of(module, OURS) for module in imported(path))]
    assert not any(f"{CONVERSION}.__main__" in imported(path) for path in SOURCES)


def test_the_command_line_starts_without_torch():
    code = (
        "import sys\n"
        "from megatron_policysplit.cli.main import main\n"
        "sys.argv = ['policysplit', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and done.stdout.splitlines()[-1] == "[]"
