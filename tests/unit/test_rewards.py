import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_policysplit.data.questions import Question, load_questions
from megatron_policysplit.errors import ConfigError, TrainingError
from megatron_policysplit.rewards import RewardPool, load_reward
from megatron_policysplit.rewards.reasoning_gym import EVAL_TASKS, PARSE_EXPR_TASKS

SPOILED = """
import os, signal, sys, time

def reward(response, question):
    if response == "raise":
        raise KeyError("lost")
    if response == "sys.exit":
        sys.exit(0)
    if response == "hang":
        time.sleep(1000)
    if response == "hang in C":
        return 10 ** 10 ** 9
    if response == "exit":
        os._exit(3)
    if response == "quiet exit":
        os._exit(0)
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "nap":
        time.sleep(1.0)
    if response == "torch":
        return float("torch" in sys.modules)
    if response == "pid":
        return os.getpid()
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1.0", "true": True}
    return values.get(response, 0.5)

def numpy_reward(response, question):
    import numpy
    return numpy.float32(0.25)


not_callable = 3
"""


@pytest.fixture
def spoiled(tmp_path, monkeypatch):
    (tmp_path / "spoiled_reward.py").write_text(SPOILED)
    monkeypatch.chdir(tmp_path)
    yield "spoiled_reward:reward"
    sys.modules.pop("spoiled_reward", None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def question(answer=None, record=None):
    return Question(0, [{"role": "user", "content": "?"}], answer, record or {})


def workers_of(pid):
    """Living child processes that Python's multiprocessing spawned for work; its resource tracker is none of them."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{4}, no: \boxed{5}", "5", 1.0),
        (r"\boxed{5}, no: \boxed{4}", "5", 0.0),
        (r"\boxed{5} of 17 cases", "5", 1.0),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt{3}/2", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        ("We add 3 and 4. The answer is 1,234.", "1234", 1.0),
        ("x is 3/4", "0.75", 1.0),
        ("it is -5", "-5", 1.0),
        ("it is -5", "5", 0.0),
        ("10-5", "5", 1.0),
        ("7", "$7$", 1.0),
        ("42", r"\boxed{42}", 1.0),
        (r"cut off in \boxed{4", "4", 1.0),
        ("no number", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_math(response, answer, expected):
    assert load_reward("math")(response, question(answer)) == expected


def test_math_needs_an_answer():
    with pytest.raises(ValueError, match="no answer"):
        load_reward("math")("3", question())


def test_exact():
    reward = load_reward("exact")
    assert reward("  a\n b ", question("a b")) == 1.0
    assert reward("A b", question("a b")) == 0.0
    with pytest.raises(ValueError, match="no answer"):
        reward("a", question())


def test_reasoning_gym_scores_as_the_task_does():
    reward = load_reward("reasoning_gym")
    options = {"size": 3, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    first = load_questions("reasoning_gym:chain_sum", options)[0]
    # chain_sum writes plain sums, so Python itself is the reference.
    value = eval(first.record["metadata"]["expression"])
    assert reward(f" {value}\n", first) == 1.0
    assert reward(f"<answer>99</answer> wait <answer>\n{value}.0</answer> done", first) == 1.0
    assert reward(f"<answer>{value + 1}</answer>", first) < 1.0
    with pytest.raises(ValueError, match="data.path=reasoning_gym:NAME"):
        reward("3", question("3"))


def test_reasoning_gym_scorer_has_the_options_of_the_task():
    reward = load_reward("reasoning_gym")
    options = {"size": 1, "min_num_decimal_places": 1, "max_num_decimal_places": 1}
    coarse = load_questions("reasoning_gym:decimal_arithmetic", options)[0]
    fine = load_questions("reasoning_gym:decimal_arithmetic", {"size": 1})[0]
    assert coarse.record["reasoning_gym"]["options"] == {"seed": 0, **options}
    # The task accepts an error of one unit in the last place that its options allow: 0.1, and 0.001 by default.
    assert reward(str(float(coarse.answer) + 0.05), coarse) == 1.0
    assert reward(str(float(fine.answer) + 0.05), fine) == 0.0


@pytest.mark.parametrize("task", sorted(EVAL_TASKS | PARSE_EXPR_TASKS))
def test_reasoning_gym_runs_no_code_of_a_model(task, tmp_path):
    reward = load_reward("reasoning_gym")
    first = load_questions(f"reasoning_gym:{task}", {"size": 1})[0]
    trace = tmp_path / "ran"
    payloads = [
        f"open({str(trace)!r}, 'w')",
        f"[open({str(trace)!r}, 'w')]",
        f"1 + len(str(open({str(trace)!r}, 'w')))",
        f"sqrt(\"open({str(trace)!r}, 'w')\")",
        f"(open({str(trace)!r}, 'w'))!",
        f"().__class__.__base__.__subclasses__()[0] or open({str(trace)!r}, 'w')",
    ]
    for payload in payloads:
        reward(payload, first)
        assert not trace.exists(), payload


@pytest.mark.parametrize("task", sorted(EVAL_TASKS | PARSE_EXPR_TASKS))
def test_reasoning_gym_right_answers_pass_the_guard(task):
    import reasoning_gym

    for entry in load_questions(f"reasoning_gym:{task}", {"size": 8, "seed": 5}):
        if "Integral(" in entry.answer:
            continue  # sympy did not solve it: repeating the question is no answer
        scorer = reasoning_gym.create_dataset(task, size=1, seed=5)
        expected = scorer.score_answer(entry.answer, entry.record)
        assert expected == 1.0
        assert load_reward("reasoning_gym")(entry.answer, entry) == expected


def test_every_reasoning_gym_scorer_that_evaluates_is_guarded():
    """A new release may bring more of them: each scorer whose source evaluates anything is known here."""
    import inspect
    import re

    from reasoning_gym.factory import DATASETS

    found = {
        name
        for name, (dataset, _) in DATASETS.items()
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(dataset.score_answer))
    }
    # number_sorting evaluates its own reference answer only.
    assert found == EVAL_TASKS | PARSE_EXPR_TASKS | {"number_sorting"}


def test_math_runs_no_code_of_a_model(tmp_path):
    trace = tmp_path / "ran"
    for code in (f"open({str(trace)!r},'w')", f"__import__('os').mkdir({str(trace)!r})"):
        for response in (code, f"\\boxed{{{code}}}", f"${code}$", f"\\boxed{{1+{code}}}"):
            load_reward("math")(response, question("1"))
    assert not trace.exists()


@pytest.mark.parametrize(
    "function, message",
    [
        ("maths", "reward.function=maths is not one of math, reasoning_gym, exact and not of the form"),
        ("no_such_module:reward", "reward.function=no_such_module:reward cannot be imported: ModuleNotFoundError"),
        ("spoiled_reward:nothing", "the module spoiled_reward has no `nothing`"),
        ("spoiled_reward:not_callable", "is a int, which cannot be called"),
        ("broken_reward:reward", "cannot be imported: SyntaxError"),
    ],
)
def test_wrong_function(function, message, spoiled):
    with open("broken_reward.py", "w") as file:
        file.write("def reward(:")
    with pytest.raises(ConfigError, match=message):
        load_reward(function)
    with pytest.raises(ConfigError, match=message):
        RewardPool(function, 1, 1.0)


def test_pool_survives_everything_a_reward_does(spoiled):
    cases = {
        "raise": "KeyError: 'lost'",
        "sys.exit": "SystemExit: 0",
        "hang": "no result within the time limit of 1.5 s",
        "hang in C": "no result within the time limit of 1.5 s",
        "exit": "died with exit code 3, twice",
        "quiet exit": "no result within the time limit",
        "segfault": "died with exit code -11, twice",
        "nan": "the reward is nan, not a finite number",
        "inf": "the reward is inf, not a finite number",
        "none": "the reward is a NoneType, not a number",
        "text": "the reward is a str, not a number",
    }
    responses = [response for case in cases for response in (case, "good")] + ["true"]
    with RewardPool(spoiled, 2, 1.5) as pool:
        graded = pool.grade([(response, question()) for response in responses])
        for response, result in zip(responses, graded, strict=True):
            if response in cases:
                assert result.reward == 0.0
                assert cases[response] in result.error, response
            else:
                assert (result.reward, result.error) == (1.0 if response == "true" else 0.5, None)
        again = pool.grade([("good", question())] * 3 + [("torch", question())])
        assert [result.reward for result in again] == [0.5, 0.5, 0.5, 0.0], "workers must not import torch"
        assert pool.grade([]) == []
        assert len(workers_of(os.getpid())) == 2
    assert workers_of(os.getpid()) == []


def test_pool_takes_numpy_numbers(spoiled):
    with RewardPool("spoiled_reward:numpy_reward", 1, 5.0) as pool:
        (result,) = pool.grade([("", question())])
    assert (result.reward, type(result.reward), result.error) == (0.25, float, None)


def test_pool_replaces_workers_that_were_killed_while_idle(spoiled):
    with RewardPool(spoiled, 2, 5.0) as pool:
        (first,) = pool.grade([("pid", question())])
        for worker in workers_of(os.getpid()):
            worker.send_signal(signal.SIGKILL)
        time.sleep(0.5)
        second, third = pool.grade([("pid", question()), ("good", question())])
        assert second.error is None and second.reward != first.reward
        assert third.reward == 0.5


def test_a_record_that_cannot_be_sent(spoiled):
    with RewardPool(spoiled, 1, 5.0) as pool:
        bad, good = pool.grade([("good", question(record={"lock": threading.Lock()})), ("good", question())])
    assert bad.reward == 0.0 and "cannot be sent to a grading process: cannot pickle" in bad.error
    assert good.reward == 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_from_outside_costs_no_reward(spoiled, number):
    with RewardPool(spoiled, 2, 10.0) as pool:
        pool.grade([("good", question())] * 2)
        busy = workers_of(os.getpid())
        killer = threading.Timer(0.3, lambda: [worker.send_signal(number) for worker in busy])
        killer.start()
        graded = pool.grade([("nap", question())] * 4)
        killer.join()
        assert {worker.pid for worker in workers_of(os.getpid())}.isdisjoint(worker.pid for worker in busy)
    assert [(result.reward, result.error) for result in graded] == [(0.5, None)] * 4


def test_pool_stops_when_workers_cannot_start(tmp_path, monkeypatch):
    (tmp_path / "parent_only.py").write_text(
        textwrap.dedent(f"""
        import os
        if os.getpid() != {os.getpid()}:
            raise RuntimeError("not here")
        def reward(response, question):
            return 1.0
        """)
    )
    monkeypatch.chdir(tmp_path)
    with RewardPool("parent_only:reward", 1, 5.0) as pool:
        with pytest.raises(TrainingError, match="reward.function=parent_only:reward end before they grade"):
            pool.grade([("", question())])
    assert workers_of(os.getpid()) == []


def test_workers_die_with_a_killed_parent(spoiled):
    script = textwrap.dedent("""
        from megatron_policysplit.data import Question
        from megatron_policysplit.rewards import RewardPool

        if __name__ == "__main__":
            ask = Question(0, [], None, {})
            with RewardPool("spoiled_reward:reward", 2, 2.0) as pool:
                pool.grade([("good", ask)] * 4)
                print("ready", flush=True)
                pool.grade([("hang", ask), ("good", ask)] * 50)
        """)
    with open("killed_parent.py", "w") as file:
        file.write(script)
    parent = subprocess.Popen([sys.executable, "killed_parent.py"], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.5)
        children = workers_of(parent.pid)
        assert len(children) == 2
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_stuck_in_c_code_ends_itself(spoiled, monkeypatch):
    """The last resort for an orphan whose interpreter never runs again: the kernel's timer."""
    script = textwrap.dedent("""
        from megatron_policysplit.data import Question
        from megatron_policysplit.rewards import pool

        pool._ORPHAN_SECONDS = 0.5
        pool._start_worker.__globals__["_end_with_parent"] = lambda: None
        pool._start_worker("spoiled_reward:reward", 0.5)
        print(pool._grade("good", Question(0, [], None, {})).reward, flush=True)
        pool._grade("hang in C", Question(0, [], None, {}))
        """)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("0.5\n", -signal.SIGALRM)
    assert time.monotonic() - started < 30


def test_many_responses_at_once():
    with RewardPool("exact", 2, 5.0) as pool:
        pool.grade([("1", question("1"))] * 4)
        graded = pool.grade([("1", question("1"))] * 500)
    assert [result.reward for result in graded] == [1.0] * 500


def test_a_worker_that_is_still_starting_ends_without_a_word(tmp_path):
    """The first process to import the script grades; the second is still importing it when the pool closes."""
    (tmp_path / "slow_start.py").write_text(
        textwrap.dedent("""
            import os, signal, time
            from pathlib import Path
            from megatron_policysplit.data import Question
            from megatron_policysplit.rewards import RewardPool

            def reward(response, question):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the pool waits 3 s for this worker to end
                return 1.0

            if __name__ == "__mp_main__":
                try:
                    Path("first").touch(exist_ok=False)
                except FileExistsError:
                    Path("second").touch()
                    time.sleep(1)
            if __name__ == "__main__":
                question = Question(0, [], None, {})
                with RewardPool("slow_start:reward", 2, 30) as pool:
                    print(pool.grade([("a", question)])[0].reward)
                    while not Path("second").exists():
                        time.sleep(0.05)
            """)
    )
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    done = subprocess.run(
        [sys.executable, "slow_start.py"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")
