"""What the source may not do: ask for the device outside one module, or import Megatron in the pure parts."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for name in ("megatron_policysplit", "checkpoints_conv") for path in (ROOT / name).rglob("*.py"))
DEVICE_MODULE = ROOT / "megatron_policysplit" / "actor" / "cpu.py"
PURE = ("advantages/", "losses.py", "rows.py", "training_signals.py", "metrics.py", "vocab_parallel/", "plan.py")
# Asking which device there is; cpu.backend(), cpu.device() and the like only pass its answers on.
DEVICE_QUESTION = re.compile(
    r"cuda\.is_available|cuda\.device_count|\bcpu\.active\b|\bhas_cuda\b|\.is_cuda\b|"
    r"\bdevice\.type\b|get_device_name|import active\b"
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


def test_only_one_module_asks_for_the_device():
    asked = {path: DEVICE_QUESTION.findall(code_without_docstrings(path)) for path in SOURCES}
    assert "cuda.is_available" in asked.pop(DEVICE_MODULE)
    offenders = {name(path): questions for path, questions in asked.items() if questions}
    assert not offenders, f"these ask for the device: {offenders}"


def test_megatron_stays_in_the_actor():
    actor = ROOT / "megatron_policysplit" / "actor"
    outside = [path for path in SOURCES if actor not in path.parents]
    assert len(outside) < len(SOURCES)
    modules = {(name(path), module) for path in outside for module in imported(path)}
    offenders = sorted(pair for pair in modules if is_of(pair[1], "megatron"))
    assert not offenders, f"these import Megatron: {offenders}"


def test_pure_parts_import_no_megatron_and_no_actor():
    package = ROOT / "megatron_policysplit"
    pure = [path for path in SOURCES if str(path.relative_to(package.parent)).startswith("megatron_policysplit/")]
    pure = [path for path in pure if str(path.relative_to(package)).startswith(PURE)]
    assert len(pure) >= 11
    for path in pure:
        modules = set(imported(path))
        assert not [module for module in modules if is_of(module, "megatron")], name(path)
        assert not [module for module in modules if is_of(module, "megatron_policysplit.actor")], name(path)


def test_rollouts_know_of_the_actor_only_its_device_and_its_groups():
    allowed = {f"megatron_policysplit.actor{rest}" for rest in ("", ".cpu", ".parallel", ".parallel.Layout")}
    rollout = [path for path in SOURCES if ROOT / "megatron_policysplit" / "rollout" in path.parents]
    assert len(rollout) >= 15
    for path in rollout:
        actor = {module for module in imported(path) if is_of(module, "megatron_policysplit.actor")}
        assert actor <= allowed, f"{name(path)} imports {sorted(actor - allowed)}"


def test_conversion_knows_nothing_of_training():
    """But for its command line, which is that of `policysplit convert` and which nothing imports."""
    package = ROOT / "checkpoints_conv"
    assert set(imported(package / "__main__.py")) == {
        "megatron_policysplit.convert",
        "megatron_policysplit.convert.main",
    }
    assert not any("checkpoints_conv.__main__" in imported(path) for path in SOURCES)
    for path in set(package.rglob("*.py")) - {package / "__main__.py"}:
        own = {module for module in imported(path) if is_of(module, "megatron_policysplit")}
        assert all(is_of(module, "megatron_policysplit.errors") for module in own), (name(path), own)
        assert not [module for module in imported(path) if is_of(module, "megatron")], name(path)


def test_the_device_question_is_recognised():
    assert DEVICE_QUESTION.search("if torch.cuda.is_available():")
    assert DEVICE_QUESTION.search("x = cpu.active()")
    assert DEVICE_QUESTION.search("if tensor.is_cuda:")
    assert not DEVICE_QUESTION.search("cpu.backend(); cpu.device(); torch.device('cpu')")
