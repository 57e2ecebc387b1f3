"""Chat templates that fail, their arguments, what they leave out, and the prompts of many questions at once."""

import inspect
import json

import pytest

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.data import chat_template
from megatron_policysplit.data.prompts import LOT, PromptBuilder
from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError, DataError, ModelError, UserError
from megatron_policysplit.rows import Mode
from tests.unit.test_modes import DATED, INSIDE_USER, PLAIN, PROMPT, SYSTEM, USER, WALKING, bare_tokenizer  # noqa: F401

BUDGET = "{% if thinking_budget is defined and thinking_budget > 0 %}{{ '' }}{% endif %}" + PLAIN
MACRO = PLAIN + (
    "{% set memory = namespace(x=0) %}{% macro close(deep=depth) %}{{ memory.x }}{{ style }}{% endmacro %}"
    "{% if not names is defined %}{% set names = [] %}{% endif %}{% generation %}{{ inside }}{% endgeneration %}"
    "{% for name in names %}{% continue %}{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLED = (
    "{% if tools %}{{ '<|im_start|>tools' + (tools|tojson) + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function|tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def builder(bare_tokenizer):  # noqa: F811
    def make(template, vocab_size=None, **modes):
        bare_tokenizer.chat_template = template
        given = ModesConfig(**{"high_entropy_prompt": PROMPT, **modes})
        return PromptBuilder(bare_tokenizer, given, "2025-03-09", vocab_size=vocab_size)

    return make


def refused(kind: type[UserError], build, *arguments, **modes) -> str:
    with pytest.raises(kind) as error:
        build(*arguments, **modes)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0].content | shout }}", "line 1: No filter named 'shout'"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError: maximum recursion depth"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
        (PLAIN + r"{{ '\ud800' }}", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'"),
        ("{% include 'other' %}", "TypeError: no loader for this environment specified"),
        ("{{ [1, 'a'] | sort }}", "TypeError: '<' not supported between instances of 'str' and 'int'"),
    ],
)
def test_a_template_that_fails(builder, template, why):
    text = refused(ModelError, builder, template)
    assert text.startswith("the chat template of this model does not render: ") and why in text
    assert text.endswith("; put a chat_template.jinja that does into that directory")


def test_a_template_that_fails_on_some_messages(builder):
    made = builder(PLAIN + "{{ 0 if messages|length < 4 else 1 / 0 }}".replace("{{ 0", "{{ ''"))
    messages = [USER, {"role": "assistant", "content": "4"}] * 2 + [USER]
    text = refused(DataError, made.build_all, [Question(0, [USER], None, {}), Question(7, messages, None, {})])
    roles = "['user', 'assistant', 'user', 'assistant', 'user']"
    assert text == (
        f"question 7: the chat template of this model refuses messages with the roles {roles}: "
        "ZeroDivisionError: division by zero"
    )


def test_arguments_with_wrong_values(builder):
    made = builder(BUDGET, chat_template_kwargs={"thinking_budget": 512})
    assert made.render([USER])[Mode.NORMAL].startswith("<|im_start|>user")
    text = refused(ConfigError, builder, BUDGET, chat_template_kwargs={"thinking_budget": "512"})
    assert text == (
        "modes.chat_template_kwargs={'thinking_budget': '512'}: the chat template of this model fails with it "
        "(TypeError: '>' not supported between instances of 'str' and 'int'); change the value, or remove it"
    )
    failing = "{{ 1 / 0 }}{{ thinking_budget }}"
    assert "does not render: ZeroDivisionError" in refused(
        ModelError, builder, failing, chat_template_kwargs={"thinking_budget": 1}
    )


@pytest.mark.parametrize("condition", ["messages[0].role == 'system'", "messages|length > 2", "tools"])
def test_arguments_whose_values_fail_on_some_messages(builder, condition):
    """The value is to blame, not the model, the mode's prompt or the question."""
    guarded = "{% if " + condition + " and (budget is not defined or budget > 0) %}{% endif %}" + TOOLED
    asked = Question(5, [USER, {"role": "assistant", "content": "4"}, USER], None, {}, [CALL])
    builder(guarded, chat_template_kwargs={"budget": 1}).build_all([asked])

    def build(budget, template=guarded):
        builder(template, chat_template_kwargs={"budget": budget}).build_all([asked], source="q.jsonl")

    text = refused(ConfigError, build, "512")
    where = "" if "system" in condition else "question 5 of q.jsonl: "
    sentence = where + "modes.chat_template_kwargs={'budget': '512'}: the chat template of this model fails with it "
    assert text == f"{sentence}(TypeError: '>' not supported between instances of 'str' and 'int'); " + (
        "change the value, or remove it"
    )
    # The template fails without a value, too, in another way.
    needed = guarded.replace("budget is not defined or ", "")
    assert refused(ConfigError, build, "512", needed).endswith("'str' and 'int'); change the value")


def test_names_of_transformers_are_known_without_importing_it(bare_tokenizer):  # noqa: F811
    parameters = set(inspect.signature(bare_tokenizer.apply_chat_template).parameters)
    assert parameters <= chat_template._TAKEN


def test_an_argument_may_have_any_other_name(builder):
    for name in ("context", "args", "missing", "environment", "loop_control"):
        made = builder(PLAIN + "{{ '' ~ " + name + " }}", chat_template_kwargs={name: "of a search"})
        assert made.render([USER])[Mode.NORMAL].endswith("of a search")


def test_a_directory_is_checked_without_its_tokenizer(tmp_path):
    def check(**kwargs):
        return chat_template.check_template_files(tmp_path, kwargs)

    check(x=1)  # nothing there: told elsewhere
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": PLAIN, "bos_token": "<s>"}))
    check(enable_thinking=False)
    never = f"modes.chat_template_kwargs.{{}}: the chat template of {tmp_path} never reads it; {{}}"
    assert refused(ConfigError, check, enable_thinkng=0) == never.format(
        "enable_thinkng", "did you mean enable_thinking?"
    )
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + BUDGET)  # comes before the other
    check(thinking_budget=1)
    assert refused(ConfigError, check, x=0) == never.format(
        "x", "remove it (it reads enable_thinking, thinking_budget)"
    )
    assert refused(ConfigError, check, padding=True).endswith("padding is set by policysplit itself; remove it")
    for damage, why in (("{% for m in %}", "line 1: Expected an expression"), ("{{ x | shout }}", "No filter named")):
        (tmp_path / "chat_template.jinja").write_text(damage)
        text = refused(ModelError, check)
        assert text.startswith(f"the chat template of {tmp_path} does not render: ") and why in text
    (tmp_path / "chat_template.jinja").unlink()
    several = [{"name": "default", "template": PLAIN}, {"name": "rag", "template": BUDGET}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    check(x=1)  # the tokenizer chooses


@pytest.mark.parametrize(
    "name",
    "tools messages documents self padding truncation max_length return_tensors return_dict tokenizer_kwargs "
    "return_assistant_tokens_mask continue_final_message conversation chat_template add_generation_prompt tokenize "
    "strftime_now raise_exception".split(),
)
def test_arguments_that_are_not_the_users(builder, name):
    text = refused(ConfigError, builder, PLAIN, chat_template_kwargs={name: True})
    assert text == f"modes.chat_template_kwargs.{name} is set by policysplit itself; remove it"


def test_arguments_that_the_template_never_reads(builder):
    never = "modes.chat_template_kwargs.{}: the chat template of this model never reads it; {}"
    text = refused(ConfigError, builder, PLAIN, chat_template_kwargs={"enable_thinkng": False})
    assert text == never.format("enable_thinkng", "did you mean enable_thinking?")
    text = refused(ConfigError, builder, PLAIN, chat_template_kwargs={"x": False})
    assert text == never.format("x", "remove it (it reads enable_thinking)")
    for own in ("message", "loop"):  # variables of the template's own
        assert "never reads it" in refused(ConfigError, builder, PLAIN, chat_template_kwargs={own: 1})
    text = refused(ConfigError, builder, TOOLED, chat_template_kwargs={"x": False})
    assert text == never.format("x", "remove it (it reads no variable)")


@pytest.mark.parametrize("name", ["depth", "style", "names", "inside", "enable_thinking"])
def test_arguments_that_are_read_in_macros_and_blocks(builder, name):
    builder(MACRO, chat_template_kwargs={name: []})
    for local in ("memory", "deep", "name"):
        refused(ConfigError, builder, MACRO, chat_template_kwargs={local: []})


def test_a_prompt_that_does_not_open_the_assistants_turn(builder):
    turns = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    text = refused(ModelError, builder, turns)
    assert text.startswith(
        r"the chat template of this model ignores add_generation_prompt, so prompts lack '<|im_start|>assistant\n', "
        "which opens the assistant's turn; put a chat_template.jinja that writes it where "
    )
    # The opening is always there, or it is the end of the user's turn.
    builder(turns + "{{ '<|im_start|>assistant\n' }}")
    builder("{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'assistant' else '\nA:' }}{% endfor %}")


def test_what_rows_have_besides_reaches_the_template(builder):
    made = builder(TOOLED)
    calling = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    answered = [*calling, {"role": "tool", "content": "21 C", "tool_call_id": "x"}]
    texts = made.render(answered, tools=[CALL["function"]])
    for text in texts.values():
        assert text.startswith('<|im_start|>tools[{"name": "weather"')
        assert 'assistant\n{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>' in text
    assert texts == made.render([*calling, {"role": "tool", "content": "21 C"}], tools=[CALL["function"]])


def test_what_the_template_leaves_out_is_refused(builder):
    lost = "the chat template of this model never writes `{}`, which would be lost; remove it from the rows, or put a "
    calling = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "21 C"}]
    assert refused(DataError, builder(PLAIN).render, calling).startswith(lost.format("tool_calls"))
    assert refused(DataError, builder(PLAIN).render, [USER], [CALL]).startswith(lost.format("tools"))
    named = [{**USER, "name": "Ann"}]
    assert refused(DataError, builder(TOOLED).render, named).startswith(lost.format("name"))
    thought = [USER, {"role": "assistant", "content": "4", "reasoning_content": "two and two"}, USER]
    assert refused(DataError, builder(PLAIN).render, thought).startswith(lost.format("reasoning_content"))
    # As Qwen3's does, a template may leave out the reasoning of earlier turns.
    builder(PLAIN + "{% if messages[-1].reasoning_content %}{{ messages[-1].reasoning_content }}{% endif %}").render(
        thought
    )


def test_ids_that_the_model_has_no_embedding_for(builder, bare_tokenizer):  # noqa: F811
    size = len(bare_tokenizer)
    made = builder(PLAIN, vocab_size=size)
    assert made.build([USER]) == builder(PLAIN).build([USER])
    small = bare_tokenizer.convert_tokens_to_ids("<|im_start|>")
    text = refused(DataError, builder(PLAIN, vocab_size=small).build_all, [Question(3, [USER], None, {})])
    assert text == (
        f"question 3: the normal prompt has the token '<|im_start|>' of id {small}, and the embedding of this model "
        f"ends at vocab_size={small}; remove the token from the tokenizer's files, or use the model's own tokenizer"
    )
    # The prompt of one mode alone.
    accented = builder(PLAIN, vocab_size=bare_tokenizer.convert_tokens_to_ids("[INST]"), high_entropy_prompt="[INST]")
    assert refused(DataError, accented.build, [USER]).startswith("the high_entropy prompt has the token '[INST]'")


@pytest.mark.parametrize("template", [PLAIN, WALKING, DATED, INSIDE_USER])
def test_many_prompts_at_once_are_what_transformers_makes_of_the_messages(template, builder, bare_tokenizer):  # noqa: F811
    """Also where users write special tokens, and where the template writes the first token or does not."""
    said = ["2 + 2", "<|im_end|>\n<|im_start|>assistant\n4", "<s>[INST] a  b", " x ", "é🙂", "<|eot|>", "<|im_en"]
    questions = [Question(index, [{"role": "user", "content": text}], None, {}) for index, text in enumerate(said)]
    prompts = builder(template).build_all(questions)
    for question in questions:
        expected = bare_tokenizer.apply_chat_template(
            question.messages, add_generation_prompt=True, return_dict=True, date_string="09 Mar 2025"
        )
        assert prompts[question.id][Mode.NORMAL] == expected["input_ids"]


def questions_of(count):
    turns = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sûr? 🙂"}]
    kinds = [[USER], [SYSTEM, USER], turns, [{"role": "user", "content": "word " * 50}]]
    return [Question(index, kinds[index % 4], None, {}) for index in range(count)]


@pytest.mark.parametrize("count", [0, 1, LOT, 2 * LOT + 3])
def test_many_prompts_at_once_are_those_of_one_by_one(builder, count):
    made, done = builder(PLAIN), []
    questions = questions_of(count)
    assert made.build_all(questions, done.append) == {
        question.id: made.build(question.messages, question.tools) for question in questions
    }
    assert sum(done) == count and all(0 < size <= LOT for size in done)
