"""A method with a per-token term that no loss has: added as docs/new_method.md says, and trained by the actor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB

ROOT = Path(__file__).resolve().parents[2]
BETA = 0.5

# One optimizer step on one rank, and what its loss must be by the log-probs before it: at ratio 1 a token's policy
# loss is -A, and right answers cost -beta log pi on top.
STEP = f"""
import json, sys
import torch
from checkpoints_conv import read_hf_config
from megatron_policysplit.actor import parallel
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.config import ParallelConfig
from tests.support.training_cases import Case, update_batch

layout = parallel.initialize(ParallelConfig(), seed=0)
case = Case("imitation", settings={{"algorithm.name": "imitation", "algorithm.options.imitation": {{"beta": {BETA}}}}})
config = case.config(sys.argv[1])
actor = Actor(config, read_hf_config(sys.argv[1]), layout)
rows = case.rows(0)
placed = actor.place(rows, case.live(rows, config), seed={SEED})
old = actor.log_probs(placed)
builder = case.builder(rows, old, placed, config)
signals = case.builder(rows, old, placed, config).for_step(0)
update = update_batch(actor, placed, builder)
expected = 0.0
for index, row in enumerate(rows):
    right = row.rollout.reward > 0.5
    loss = -signals[index].advantages.double() - {BETA} * right * old[index].logprobs.double()
    expected += float((loss * signals[index].weights).sum())
print(json.dumps([update.loss, expected, any(row.rollout.reward > 0.5 for row in rows)]))
"""


def blocks(page):
    """The Python blocks of a page, in order."""
    return [part.split("```")[0] for part in page.split("```python\n")[1:]]


def insert_before(path, line, text):
    source = path.read_text()
    assert source.count(line) == 1, f"{path.name} has {source.count(line)} lines {line!r}"
    path.write_text(source.replace(line, text + line))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the packages and of the tests' helpers, with the changes of the page."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("megatron_policysplit", "checkpoints_conv"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").symlink_to(ROOT / "tests")
    _, field, term, method = blocks((ROOT / "docs" / "new_method.md").read_text())
    algorithms = root / "megatron_policysplit" / "algorithms"
    insert_before(algorithms / "token_signals.py", "\n    # The builder fills these.\n", field)
    insert_before(algorithms / "loss.py", "    loss = (token_loss * signals.weights).sum()\n", term)
    (algorithms / "methods" / "imitation.py").write_text(method)
    return root


def test_a_new_term_is_a_field_and_a_line(package, tmp_path):
    make_model(tmp_path / "model", "qwen3", tied=True, vocab=VOCAB, seed=0)
    environment = {"PYTHONPATH": str(package), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", STEP, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss, expected, has_right_answers = json.loads(done.stdout.splitlines()[-1])
    assert has_right_answers and loss == pytest.approx(expected, rel=1e-5)
