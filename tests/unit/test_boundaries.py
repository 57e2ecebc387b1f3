"""What the source may not do: ask for the device outside one module, or import Megatron in the pure parts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for name in ("megatron_policysplit", "checkpoints_conv") for path in (ROOT / name).rglob("*.py"))
DEVICE_MODULE = ROOT / "megatron_policysplit" / "distributed" / "device.py"
MEGATRON_ON_CPU = ROOT / "megatron_policysplit" / "actor" / "megatron_on_cpu.py"
PURE = ("algorithms/", "rows/", "training/metrics.py", "vocab_parallel/")
# Asking which device there is; device.backend(), device.training_device() and the like only pass its answers on.
DEVICE_QUESTION = re.compile(
    r"cuda\.is_available|cuda\.device_count|\bhas_cuda\b|\.is_cuda\b|\bdevice\.type\b|get_device_name|\bon_cpu\b"
)


def name(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Every module a file imports, anywhere in it (inside functions too); relative imports are refused."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_of(module, package):
    return module == package or module.startswith(package + ".")


def code_without_docstrings(path):
    """The source as code alone, so that prose may speak of devices."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value = ast.Constant(value=None)
    return ast.unparse(tree)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_one_module_asks_for_the_device(path):
    found = DEVICE_QUESTION.findall(code_without_docstrings(path))
    if path == DEVICE_MODULE:
        assert "cuda.is_available" in found
    elif path != MEGATRON_ON_CPU:
        assert not found, f"{name(path)} asks for the device: {found}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_megatron_stays_in_the_actor(path):
    megatron = sorted({module for module in imported(path) if is_of(module, "megatron")})
    actor = ROOT / "megatron_policysplit" / "actor"
    assert not megatron or actor in path.parents, f"{name(path)} imports {megatron}"


def test_pure_parts_import_no_megatron_and_no_actor():
    package = ROOT / "megatron_policysplit"
    pure = [path for path in SOURCES if str(path.relative_to(package.parent)).startswith("megatron_policysplit/")]
    pure = [path for path in pure if str(path.relative_to(package)).startswith(PURE)]
    assert len(pure) >= 11
    for path in pure:
        modules = set(imported(path))
        assert not [module for module in modules if is_of(module, "megatron")], name(path)
        assert not [module for module in modules if is_of(module, "megatron_policysplit.actor")], name(path)


def test_rollouts_and_servers_know_nothing_of_the_actor():
    package = ROOT / "megatron_policysplit"
    wing = [path for path in SOURCES if {package / "rollout", package / "serving"} & set(path.parents)]
    assert len(wing) >= 20
    for path in wing:
        actor = {module for module in imported(path) if is_of(module, "megatron_policysplit.actor")}
        assert not actor, f"{name(path)} imports {sorted(actor)}"


def test_conversion_knows_nothing_of_training():
    """But for its command line, which is that of `policysplit convert` and which nothing imports."""
    package = ROOT / "checkpoints_conv"
    commands = {module for module in imported(package / "__main__.py") if is_of(module, "megatron_policysplit")}
    assert commands == {"megatron_policysplit.cli.convert", "megatron_policysplit.cli.convert.main"}
    assert not any("checkpoints_conv.__main__" in imported(path) for path in SOURCES)
    for path in set(package.rglob("*.py")) - {package / "__main__.py"}:
        ours = {module for module in imported(path) if is_of(module, "megatron_policysplit")}
        assert not ours, f"{name(path)} imports {sorted(ours)}"
        assert not [module for module in imported(path) if is_of(module, "megatron")], name(path)


def test_the_device_question_is_recognised():
    assert DEVICE_QUESTION.search("if torch.cuda.is_available():")
    assert DEVICE_QUESTION.search("x = on_cpu()")
    assert DEVICE_QUESTION.search("if tensor.is_cuda:")
    assert not DEVICE_QUESTION.search("backend(); training_device(); torch.device('cpu')")
