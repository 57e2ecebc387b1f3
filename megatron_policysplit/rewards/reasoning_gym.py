"""`reasoning_gym`: the task's own scorer."""

from __future__ import annotations

import ast
import functools
import json
import re

import reasoning_gym

from megatron_policysplit.data.questions import Question

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

# Scorers of these tasks evaluate the answer as Python, which would run code that a model wrote: the
# first through eval(), to which a text that is no Python expression does nothing, the second
# through sympy's parse_expr().
EVAL_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
PARSE_EXPR_TASKS = frozenset(
    {
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)
_SAFE_NODES = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load, ast.Call),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop),
)
_SAFE_FUNCTIONS = frozenset(
    (
        "abs acos acosh asin asinh atan atanh cos cosh cot csc exp ln log sec sin sinh sqrt tan "
        "tanh"
    ).split()
)


def reward(response: str, question: Question) -> float:
    """The task's own score, in [0, 1], of the answer in a response.

    The answer is the text in the last <answer>..</answer>, or the whole response without them.
    Where the task's scorer evaluates it as Python, one that is not plain arithmetic scores 0.
    Raises ValueError for a question of another kind of data set.
    """
    origin = question.record.get("reasoning_gym")
    if origin is None:
        raise ValueError(
            f"question {question.id} is not of data.path=reasoning_gym:NAME, which this reward "
            "needs"
        )
    tagged = _ANSWER.findall(response)
    answer = (tagged[-1] if tagged else response).strip()
    # A composite data set names the task that each question is of.
    task = question.record["metadata"].get("source_dataset", origin["name"])
    if task in EVAL_TASKS | PARSE_EXPR_TASKS and not _is_harmless(
        answer, unless_python=task in EVAL_TASKS
    ):
        return 0.0
    dataset = _dataset(origin["name"], json.dumps(origin["options"], sort_keys=True))
    return dataset.score_answer(answer, entry=question.record)


def _is_harmless(text: str, unless_python: bool) -> bool:
    """Whether a text has only literals, names, arithmetic, lists and elementary functions.

    unless_python: what a text that is no Python expression counts as.
    """
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return unless_python
    for node in nodes:
        if not isinstance(node, _SAFE_NODES) or (
            isinstance(node, ast.Name) and node.id.startswith("_")
        ):
            return False
        if isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id in _SAFE_FUNCTIONS
            # A function of sympy evaluates a string that it is given.
            texts = any(
                isinstance(part, ast.Constant) and isinstance(part.value, str)
                for part in ast.walk(node)
            )
            if not named or node.keywords or texts:
                return False
    return True


@functools.lru_cache(maxsize=16)
def _dataset(name: str, options: str):
    """The data set whose scorer grades its questions. options: as JSON, which can be cached."""
    return reasoning_gym.create_dataset(name, **json.loads(options))
