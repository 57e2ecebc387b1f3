"""Rows with tools, behind templates of the shapes in use: the prompts are those that transformers makes of the rows."""

import json

import pytest

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.data.prompts import PromptBuilder
from megatron_policysplit.data.questions import load_questions
from megatron_policysplit.rows import Mode
from tests.unit.test_modes import bare_tokenizer  # noqa: F401

# Tools within the system turn, results within the user's, earlier reasoning left out (the shape of Qwen3).
QWEN = """
{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
        {%- if m.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>' + m.reasoning_content + '</think>' }}
        {%- endif %}{{- content }}
        {%- for call in m.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>' + call.name + (call.arguments if call.arguments is string else call.arguments | tojson) }}
            {{- '</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>' + content + '</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Tools before the first question, one call a turn (the shape of Llama 3).
LLAMA = """
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- bos_token + '<|header|>system<|/header|>' + system + '<|eot|>' }}
{%- if tools %}{{- '<|header|>user<|/header|>Call one of: ' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- messages[0].content + '<|eot|>' }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}
        {{- '<|header|>assistant<|/header|>{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}' }}
    {%- elif m.role == 'tool' %}{{- '<|header|>ipython<|/header|>' + m.content }}
    {%- else %}{{- '<|header|>' + m.role + '<|/header|>' + m.content }}{%- endif %}{{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>' }}{%- endif %}"""
# The system text and the tools before the last question, results by their ids (the shape of Mistral).
MISTRAL = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in turns %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{%- endif %}
        {{- '[INST] ' + (system if loop.index0 == ns.last else '') + m.content + ' [/INST]' }}
    {%- elif m.tool_calls %}{{- '[CALLS]' }}
        {%- for call in m.tool_calls %}{{- call.function | tojson + call.id }}{%- endfor %}{{- '<|eot|>' }}
    {%- elif m.role == 'assistant' %}{{- m.content + '<|eot|>' }}
    {%- elif m.role == 'tool' %}{{- '[RESULT]' + m.content + m.tool_call_id + '[/RESULT]' }}
    {%- endif %}
{%- endfor %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
ASKED = {"role": "user", "content": "Rain?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "no", "tool_call_id": "call00001"}
SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = "Find another way."


@pytest.fixture
def question(tmp_path):
    def read(messages, tools):
        row = {"messages": messages, "tools": tools, "answer": "no"}
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        return load_questions(str(tmp_path / "a.jsonl"))[0]

    return read


@pytest.mark.parametrize("template", [QWEN, LLAMA, MISTRAL], ids=["qwen", "llama", "mistral"])
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["no tools", "one tool", "two tools"])
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
def test_prompts_are_those_of_transformers(bare_tokenizer, question, template, tools, system):  # noqa: F811
    bare_tokenizer.chat_template = template
    builder = PromptBuilder(bare_tokenizer, ModesConfig(high_entropy_prompt=PROMPT), "2025-03-09")

    def transformers(messages):
        return bare_tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)

    thinking = [{**CALLED, "reasoning_content": "I ask."}] if template is QWEN else [CALLED]
    for turns in ([ASKED], [ASKED, CALLED, RESULT], [ASKED, *thinking, RESULT]):
        asked = question([*system, *turns], tools)
        texts = builder.render(asked.messages, asked.tools)
        assert texts[Mode.NORMAL] == transformers([*system, *turns])
        prompt = "\n\n".join([PROMPT, *(message["content"] for message in system)])
        assert texts[Mode.HIGH_ENTROPY] == transformers([{"role": "system", "content": prompt}, *turns])
        assert prompt in texts[Mode.HIGH_ENTROPY]
        assert all(("Today's weather" in text or "Today\\u0027s" in text) == bool(tools) for text in texts.values())
        assert all(("Köln" in text or "K\\u00f6ln" in text) == (len(turns) > 1) for text in texts.values())
