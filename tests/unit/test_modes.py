import datetime
import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.data.prompts import DEFAULT_HIGH_ENTROPY_PROMPT, PromptBuilder
from megatron_policysplit.data.tokenizer import has_chat_template
from megatron_policysplit.errors import ConfigError, DataError, ModelError
from megatron_policysplit.rows import MODES, Mode

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "<|header|>", "<|/header|>", "<|eot|>", "[INST]", "[/INST]"]
DEFAULT = "You are Tin, a helpful assistant."

TURNS = """
{%- for message in messages %}
    {%- if not loop.first or message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# No system turn unless one is given (the shape of Qwen3).
PLAIN = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}" + TURNS
)
# A default sentence of its own (the shape of Qwen2.5).
SENTENCE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\n" + DEFAULT + "<|im_end|>\\n' }}{%- endif %}" + TURNS
)
# A default sentence written while walking the messages (the shape of SmolLM2).
WALKING = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT + "<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Dates in every system turn, whether or not a message is given (the shape of Llama 3).
DATED = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}"""
# The date by strftime_now alone, inside the default text (the shape of SmolLM3 and Granite).
CLOCK = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>system\\nToday is ' + strftime_now('%B %d, %Y') + '.<|im_end|>\\n' }}{%- endif %}" + TURNS
)
# The system text inside the first user turn (the shape of Mistral).
INSIDE_USER = (
    "{{- bos_token }}{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
    "{%- for message in messages if message.role != 'system' %}"
    "{%- if message.role == 'assistant' %}{{- ' ' + message.content + '</s>' }}{%- else %}"
    "{{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}{%- endif %}{%- endfor %}"
)
# No system role at all (the shape of Gemma).
REFUSING = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}" + TURNS
)
IGNORING = TURNS

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Answer with one number."}
PROMPT = "Find another way."


@pytest.fixture(scope="module")
def bare_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL
    )


@pytest.fixture
def builder(bare_tokenizer):
    def make(template, date="2025-03-09", **modes):
        bare_tokenizer.chat_template = template
        return PromptBuilder(bare_tokenizer, ModesConfig(**{"high_entropy_prompt": PROMPT, **modes}), date)

    return make


def chat_ml(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def dated(system):
    head = "Cutting Knowledge Date: December 2023\nToday Date: 09 Mar 2025\n\n"
    user = f"<|header|>user<|/header|>\n\n{USER['content']}<|eot|><|header|>assistant<|/header|>\n\n"
    return f"<s><|header|>system<|/header|>\n\n{head}{system}<|eot|>{user}"


ASK = ("user", USER["content"])
CASES = {
    "plain": (PLAIN, "keep", chat_ml(ASK), chat_ml(("system", PROMPT), ASK)),
    "plain, drop": (PLAIN, "drop", chat_ml(ASK), chat_ml(("system", PROMPT), ASK)),
    "sentence": (
        *(SENTENCE, "keep", chat_ml(("system", DEFAULT), ASK)),
        chat_ml(("system", f"{DEFAULT}\n\n{PROMPT}"), ASK),
    ),
    "sentence, drop": (SENTENCE, "drop", chat_ml(ASK), chat_ml(("system", PROMPT), ASK)),
    "walking": (
        *(WALKING, "keep", chat_ml(("system", DEFAULT), ASK)),
        chat_ml(("system", f"{DEFAULT}\n\n{PROMPT}"), ASK),
    ),
    "walking, drop": (WALKING, "drop", chat_ml(ASK), chat_ml(("system", PROMPT), ASK)),
    "dated": (DATED, "keep", dated(""), dated(PROMPT)),
    "clock": (
        *(CLOCK, "keep", chat_ml(("system", "Today is March 09, 2025."), ASK)),
        chat_ml(("system", f"Today is March 09, 2025.\n\n{PROMPT}"), ASK),
    ),
    "clock, drop": (CLOCK, "drop", chat_ml(ASK), chat_ml(("system", PROMPT), ASK)),
    "inside user": (
        *(INSIDE_USER, "keep", f"<s>[INST] {USER['content']} [/INST]"),
        f"<s>[INST] {PROMPT}\n\n{USER['content']} [/INST]",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_prompts(case, builder):
    template, drop, normal, high_entropy = CASES[case]
    texts = builder(template, template_system=drop).render([USER])
    assert texts == {Mode.NORMAL: normal, Mode.HIGH_ENTROPY: high_entropy}


@pytest.mark.parametrize("drop", ["keep", "drop"])
@pytest.mark.parametrize("template", [PLAIN, SENTENCE, WALKING])
def test_system_message_of_the_data_follows_ours(template, drop, builder):
    texts = builder(template, template_system=drop).render([SYSTEM, USER])
    assert texts[Mode.NORMAL] == chat_ml(("system", SYSTEM["content"]), ASK)
    assert texts[Mode.HIGH_ENTROPY] == chat_ml(("system", f"{PROMPT}\n\n{SYSTEM['content']}"), ASK)


def test_dated_template_keeps_its_date_beside_a_system_message(builder):
    texts = builder(DATED).render([SYSTEM, USER])
    assert texts[Mode.NORMAL] == dated(SYSTEM["content"])
    assert texts[Mode.HIGH_ENTROPY] == dated(f"{PROMPT}\n\n{SYSTEM['content']}")


def test_several_turns(builder):
    turns = [USER, {"role": "assistant", "content": "5"}, {"role": "user", "content": "Sure?"}]
    texts = builder(WALKING, template_system="drop").render(turns)
    assert texts[Mode.NORMAL] == chat_ml(ASK, ("assistant", "5"), ("user", "Sure?"))


@pytest.mark.parametrize("template", [PLAIN, SENTENCE, WALKING, DATED, INSIDE_USER])
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER]])
def test_ids_are_those_of_the_template(template, messages, builder, bare_tokenizer):
    """transformers' own tokenisation of the messages is the reference; no special token is added or lost."""
    ids = builder(template).build(messages)
    date = {"date_string": "09 Mar 2025"}
    reference = bare_tokenizer.apply_chat_template(messages, add_generation_prompt=True, **date)["input_ids"]
    assert ids[Mode.NORMAL] == reference
    assert all(type(token) is int for mode in MODES for token in ids[mode])
    assert bare_tokenizer.decode(ids[Mode.HIGH_ENTROPY]) == builder(template).render(messages)[Mode.HIGH_ENTROPY]
    assert ids[Mode.HIGH_ENTROPY].count(bare_tokenizer.bos_token_id) == (template in (DATED, INSIDE_USER))


def test_dates(builder):
    today = datetime.date.today()
    for made in (builder(DATED, date=None), builder(CLOCK, date=None)):
        assert made.date == today.isoformat()
        assert str(today.year) in made.render([USER])[Mode.NORMAL]
    chosen = builder(DATED, chat_template_kwargs={"date_string": "1 Jan 1999"})
    assert "Today Date: 1 Jan 1999" in chosen.render([USER])[Mode.HIGH_ENTROPY]
    with pytest.raises(ModelError, match="strftime_now with a computed format"):
        builder(CLOCK.replace("'%B %d, %Y'", "'%B' + ' %d'"))


def test_chat_template_kwargs(builder):
    texts = builder(PLAIN, chat_template_kwargs={"enable_thinking": False}).render([USER])
    assert all(text.endswith("assistant\n<think>\n\n</think>\n\n") for text in texts.values())
    with pytest.raises(ConfigError, match="modes.chat_template_kwargs.tokenize is set by policysplit itself"):
        builder(PLAIN, chat_template_kwargs={"tokenize": False})


def test_templates_that_cannot_carry_a_system_prompt(builder):
    with pytest.raises(ModelError, match=r"refuses a system message \(System role not supported\); use a model"):
        builder(REFUSING)
    with pytest.raises(ModelError, match="ignores the system message"):
        builder(IGNORING)
    with pytest.raises(ModelError, match="has no chat template; put a chat_template.jinja"):
        builder(None)
    with pytest.raises(ModelError, match="does not render"):
        builder("{{ raise_exception('never') }}" + PLAIN)
    with pytest.raises(ModelError, match="does not render the high_entropy prompt verbatim"):
        builder(PLAIN.replace("messages[0].content +", "messages[0].content|upper|replace('ZQ','zq')|lower +"))
    with pytest.raises(ModelError, match="changes more than its system turn"):
        builder(PLAIN.replace("{{- '<|im_start|>assistant", "{{- messages[0].role + '<|im_start|>assistant"))


def test_drop_that_cannot_be_exact(builder):
    with pytest.raises(ModelError, match="template_system=drop does not work .* into every system turn; use"):
        builder(DATED, template_system="drop")
    glued = SENTENCE.replace("<|im_start|>system\\n", "SYS: ")
    assert builder(glued).render([USER])[Mode.NORMAL].startswith(f"SYS: {DEFAULT}")
    with pytest.raises(ModelError, match="template_system=drop .* cannot be told exactly"):
        builder(glued, template_system="drop")


def test_messages_that_the_template_refuses(builder):
    strict = PLAIN + "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    with pytest.raises(DataError, match=r"refuses messages with the roles \['user', 'tool'\]: no tools"):
        builder(strict).build([USER, {"role": "tool", "content": "4"}])


def test_our_prompt(builder, tmp_path):
    assert builder(PLAIN, high_entropy_prompt=None).system_prompts[Mode.HIGH_ENTROPY] == DEFAULT_HIGH_ENTROPY_PROMPT
    file = tmp_path / "prompt.txt"
    file.write_text("Denk an einen anderen Weg, größer.\n", encoding="utf-8")
    made = builder(PLAIN, high_entropy_prompt=None, high_entropy_prompt_file=str(file))
    assert made.system_prompts[Mode.HIGH_ENTROPY] == "Denk an einen anderen Weg, größer."
    with pytest.raises(ConfigError, match="high_entropy_prompt and modes.high_entropy_prompt_file are both set"):
        builder(PLAIN, high_entropy_prompt_file=str(file))
    with pytest.raises(ConfigError, match="modes.high_entropy_prompt is empty"):
        builder(PLAIN, high_entropy_prompt=" ")
    with pytest.raises(ConfigError, match="missing.txt cannot be read"):
        builder(PLAIN, high_entropy_prompt=None, high_entropy_prompt_file=str(tmp_path / "missing.txt"))
    file.write_text("\ufeffAnders.", encoding="utf-8")  # as editors of Windows save it
    made = builder(PLAIN, high_entropy_prompt=None, high_entropy_prompt_file=str(file))
    assert made.system_prompts[Mode.HIGH_ENTROPY] == "Anders."
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="prompt.txt is not UTF-8"):
        builder(PLAIN, high_entropy_prompt=None, high_entropy_prompt_file=str(file))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="prompt.txt is empty"):
        builder(PLAIN, high_entropy_prompt=None, high_entropy_prompt_file=str(file))


def test_has_chat_template_agrees_with_transformers(tmp_path, bare_tokenizer):
    def check(expected):
        loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert has_chat_template(tmp_path) is bool(loaded.chat_template) is expected

    bare_tokenizer.chat_template = None
    bare_tokenizer.save_pretrained(tmp_path)
    check(False)
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    check(True)
    (tmp_path / "chat_template.jinja").unlink()
    # Only processors of images and sound read this file.
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    check(False)
    (tmp_path / "chat_template.json").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": PLAIN}))
    check(True)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, megatron_policysplit.data.prompts, megatron_policysplit.data, megatron_policysplit.rewards;"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'sympy', 'jinja2', 'pebble') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
