"""More modes than two: configuration, shares, prompts, seeds, and Policy Split's advantages over all of them."""

import math
import statistics

import pytest
import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics, make_batch
from megatron_policysplit.algorithms.methods import build_algorithm, method_named, policy_split
from megatron_policysplit.algorithms.methods.policy_split import Options
from megatron_policysplit.algorithms.modes import samples_per_mode, training_modes
from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.load import load_config
from megatron_policysplit.config.modes import modes_of, temperatures_by_mode
from megatron_policysplit.data.prompts import read_eval_prompts, read_prompts
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rollout.collect import build_requests, request_settings
from megatron_policysplit.rollout.seeds import sample_seed
from megatron_policysplit.rows import MODES, Mode, modes_in, share_rollouts
from tests.support.advantage_batches import EOS, random_batch, rollout

CAREFUL, BOLD = Mode("careful"), Mode("bold")
FOUR = (*MODES, CAREFUL, BOLD)
OTHERS = (
    "modes.others={careful: {prompt: Check twice., temperature: 0.7, share: 2}, bold: {prompt: Be bold., top_k: 9}}"
)
NEEDED = ["model.path=m", "data.path=d", "run.dir=r"]


def config(*overrides):
    return load_config(None, [*NEEDED, *overrides])


def four_modes(*overrides):
    return config(OTHERS, "rollout.samples_per_question=10", *overrides)


def samples_of(config, method):
    return samples_per_mode(config.rollout, config.modes, method)


def test_samples_are_shared_out_over_the_modes_that_sample():
    two = config("rollout.samples_per_question=8")
    assert samples_of(two, method_named("grpo")) == {Mode.NORMAL: 8}
    assert samples_of(two, method_named("policy_split")) == {Mode.NORMAL: 4, Mode.HIGH_ENTROPY: 4}
    more = four_modes("rollout.high_entropy.share=1")
    assert samples_of(more, method_named("policy_split")) == dict(zip(FOUR, (2, 2, 4, 2), strict=True))
    uneven = config("rollout.samples_per_question=8", "rollout.high_entropy.share=3")
    assert samples_of(uneven, method_named("policy_split")) == {Mode.NORMAL: 2, Mode.HIGH_ENTROPY: 6}
    one_sided = config("rollout.samples_per_question=8", "rollout.normal.share=0")
    assert samples_of(one_sided, method_named("policy_split")) == {Mode.HIGH_ENTROPY: 8}
    assert training_modes(one_sided.modes, method_named("policy_split")) == MODES


def test_other_modes_train_only_with_a_method_that_takes_them():
    assert training_modes(four_modes().modes, method_named("policy_split")) == FOUR == modes_of(four_modes().modes)
    assert training_modes(four_modes().modes, method_named("grpo")) == (Mode.NORMAL,)
    assert samples_of(four_modes(), method_named("grpo")) == {Mode.NORMAL: 10}


def test_requests_follow_each_modes_own_sampling():
    asked = four_modes("rollout.normal.temperature=0.5")
    prompts = {3: {mode: [index] for index, mode in enumerate(FOUR)}}
    settings = request_settings(asked.rollout, asked.modes, asked.run.seed)
    requests = build_requests(0, [3], prompts, settings, samples_of(asked, method_named("policy_split")))
    assert [(r.mode, r.prompt, r.sampling.temperature, r.sampling.top_k, len(r.samples)) for r in requests] == [
        (Mode.NORMAL, [0], 0.5, -1, 2),
        (Mode.HIGH_ENTROPY, [1], 1.0, -1, 2),
        (CAREFUL, [2], 0.7, -1, 4),
        (BOLD, [3], 1.0, 9, 2),
    ]
    assert temperatures_by_mode(asked.rollout, asked.modes) == dict(zip(FOUR, (0.5, 1.0, 0.7, 1.0), strict=True))
    seeds = [seed for request in requests for seed in request.seeds]
    assert len(set(seeds)) == 10 and {sample_seed(0, 0, 3, mode, 0) >> 61 & 1 for mode in FOUR[1:]} == {1}


@pytest.mark.parametrize(
    ("others", "wrong"),
    [
        ("{High: {prompt: a}}", "modes.others.High cannot be a mode's name"),
        ("{normal: {prompt: a}}", "modes.others.normal cannot be a mode's name"),
        ("{kl: {prompt: a}}", "modes.others.kl cannot be a mode's name"),
        ("{bold: loud}", "modes.others.bold=loud is not a mapping"),
        ("{bold: {prompt: a, temperatur: 1}}", "unknown key modes.others.bold.temperatur; the options of a mode are"),
        (
            "{bold: {prompt: a, temperature: 0}}",
            "modes.others.bold.temperature=0.0 is not allowed; it must be at least 1e-06",
        ),
        ("{bold: {prompt: a, top_p: 2}}", "modes.others.bold.top_p=2.0 is a probability mass"),
        ("{bold: {prompt: a, share: 2}}", "cannot be shared out among the modes (shares: normal 1, high_entropy 1, "),
    ],
)
def test_bad_modes_are_named(others, wrong):
    with pytest.raises(ConfigError) as error:
        check_config(config("modes.others=" + others, "rollout.samples_per_question=6"))
    assert wrong in str(error.value)


def test_no_mode_that_samples():
    with pytest.raises(ConfigError, match="give one of them a share above 0"):
        check_config(config("rollout.normal.share=0", "rollout.high_entropy.share=0"))


@pytest.mark.parametrize(
    ("others", "wrong"),
    [
        ("{bold: {}}", "modes.others.bold needs a prompt or a prompt_file, and not both"),
        ("{bold: {prompt: a, prompt_file: b}}", "needs a prompt or a prompt_file, and not both"),
        ("{bold: {prompt: ' '}}", "modes.others.bold.prompt is empty"),
        ("{bold: {prompt_file: /nowhere}}", "modes.others.bold.prompt_file=/nowhere cannot be read"),
        (
            "{bold: {prompt: Think.}, dull: {prompt: 'Think. '}}",
            "modes.others.dull.prompt is the prompt of the bold mode",
        ),
    ],
)
def test_bad_prompts_of_modes_are_named(others, wrong):
    with pytest.raises(ConfigError) as error:
        read_prompts(config("modes.others=" + others).modes)
    assert wrong in str(error.value)


def test_prompts_by_mode(tmp_path):
    (tmp_path / "p.txt").write_text("From a file.\n")
    given = config(f"modes.others={{bold: {{prompt_file: {tmp_path / 'p.txt'}}}}}", "modes.high_entropy_prompt=Roam.")
    assert read_prompts(given.modes) == {Mode.HIGH_ENTROPY: "Roam.", BOLD: "From a file."}
    with pytest.raises(ConfigError, match="eval.prompts.bold cannot be a name"):
        read_eval_prompts({"bold": "Be bold."}, given.modes)


# --- advantages ----------------------------------------------------------------------------------------


def batch_of(modes, seed=0):
    """Rows and batch of two questions, one answer sampled in each mode, every response under all modes' prompts."""
    draw = torch.Generator().manual_seed(seed)
    lengths = iter(torch.randint(1, 6, (2 * len(modes),), generator=draw).tolist())
    rollouts = [
        rollout(question, mode, 0, [*range(next(lengths)), EOS], reward=float((index + question) % 2))
        for question in range(2)
        for index, mode in enumerate(modes)
    ]
    prompts = {question: {mode: [index, 7] for index, mode in enumerate(modes)} for question in range(2)}
    rows = share_rollouts(rollouts, prompts, modes)
    scored = [
        TokenStatistics(
            -torch.rand(row.response_length, generator=draw), torch.rand(row.response_length, generator=draw)
        )
        for row in rows
    ]
    masks = [torch.ones(row.response_length, dtype=torch.bool) for row in rows]
    return rows, scored, make_batch(rows, scored, masks)


def test_every_response_is_a_row_of_every_mode():
    rows, _, batch = batch_of(FOUR)
    assert len(rows) == 2 * 4 * 4 and modes_in(rows) == [*MODES, BOLD, CAREFUL]
    assert batch.others.shape == (32, 3)
    for index, others in enumerate(batch.others.tolist()):
        same = {rows[other].key for other in others}
        assert same == {rows[index].key.under(mode) for mode in FOUR} - {rows[index].key}
    assert sum(row.on_policy for row in rows) == 8


def test_other_modes_are_averaged():
    rows, scored, batch = batch_of(FOUR)
    by_key = {row.key: s.logprobs for row, s in zip(rows, scored, strict=True)}
    mean = batch.at_others(batch.logprobs).split(batch.offsets.diff().tolist())
    for row, found in zip(rows, mean, strict=True):
        others = [by_key[row.key.under(mode)] for mode in FOUR if mode != row.mode]
        torch.testing.assert_close(found, torch.stack(others).mean(0))


def test_advantages_of_four_modes_against_plain_python():
    """A_i + eta_m clip(B, |A_i| / kappa_m), the bonus over all modes; careful has an eta and an alpha of its own."""
    rows, scored, batch = batch_of(FOUR, seed=3)
    careful = {"eta": -0.2, "alpha": 1.0, "kappa": 5.0, "correctness": "dr_grpo"}
    options = Options(eta=0.3, eta_normal=0.05, alpha=0.25, modes={"careful": careful})
    found = policy_split.advantages(batch, options).split(batch.offsets.diff().tolist())
    surprise = {row.key: [-p for p in s.logprobs.tolist()] for row, s in zip(rows, scored, strict=True)}
    expected = {}
    for mode in FOUR:
        alpha, eta, kappa = {CAREFUL: (1.0, -0.2, 5.0), Mode.NORMAL: (0.25, 0.05, 2.0)}.get(mode, (0.25, 0.3, 2.0))
        for question in range(2):
            group = [row for row in rows if row.mode == mode and row.key.question == question]
            rewards = [row.rollout.reward for row in group]
            spread = 1.0 if mode == CAREFUL else statistics.stdev(rewards) + 1e-6
            mixed = {}
            for row in group:
                others = [surprise[row.key.under(other)] for other in FOUR if other != mode]
                mixed[row.key] = [
                    alpha * own + (1 - alpha) * statistics.fmean(rest)
                    for own, *rest in zip(surprise[row.key], *others, strict=True)
                ]
            tokens = [value for values in mixed.values() for value in values]
            mean, std = statistics.fmean(tokens), statistics.stdev(tokens)
            for row, reward in zip(group, rewards, strict=True):
                a = (reward - statistics.fmean(rewards)) / spread
                bound = abs(a) / kappa
                clipped = [max(-bound, min(bound, (value - mean) / (std + 1e-6))) for value in mixed[row.key]]
                expected[row.key] = [a + eta * value for value in clipped]
    for row, values in zip(rows, found, strict=True):
        assert values.tolist() == pytest.approx(expected[row.key], abs=1e-5)


def test_settings_of_the_two_modes_are_those_of_the_methods_own_keys():
    _, batch = random_batch()
    apart = Options(modes={"high_entropy": {"eta": 0.2, "kappa": 3.0}, "normal": {"eta": 0.1, "kappa": 3.0}})
    together = Options(eta=0.2, eta_normal=0.1, kappa=3.0)
    assert torch.equal(policy_split.advantages(batch, apart), policy_split.advantages(batch, together))
    assert not torch.equal(policy_split.advantages(batch, apart), policy_split.advantages(batch, Options()))


@pytest.mark.parametrize(
    ("modes", "wrong"),
    [
        ({"bold": {"eta": 1.0}}, "algorithm.options.policy_split.modes.bold: the modes of this run are normal, high_e"),
        ({"normal": 3}, "algorithm.options.policy_split.modes.normal=3 is not a mapping"),
        (
            {"normal": {"etta": 3}},
            "unknown key algorithm.options.policy_split.modes.normal.etta; the options of a mode",
        ),
        ({"normal": {"kappa": 0}}, "algorithm.options.policy_split.modes.normal.kappa=0.0 is not allowed"),
        ({"normal": {"eta": math.inf}}, "modes.normal.eta=inf is not allowed; it must be a finite number"),
        ({"normal": {"correctness": "ppo"}}, "modes.normal.correctness=ppo is not allowed; it must be one of grpo"),
    ],
)
def test_bad_advantages_of_modes_are_named(modes, wrong):
    with pytest.raises(ConfigError) as error:
        policy_split.METHOD.check(Options(modes=modes), ["normal", "high_entropy"])
    assert wrong in str(error.value)


def test_a_mode_on_asym_grpo_keeps_the_rows_that_only_it_trains():
    """A reward that is its group's mean has no advantage by GRPO; asym_grpo gives it one."""
    rewards, group = torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3, dtype=torch.int64)
    split = build_algorithm(config("algorithm.name=policy_split").algorithm)
    assert split.method.live(rewards, group, split.options).tolist() == [True, False, True]
    mixed = Options(modes={"high_entropy": {"correctness": "asym_grpo"}})
    assert split.method.live(rewards, group, mixed).tolist() == [True, True, True]
