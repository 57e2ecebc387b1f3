"""Questions as other programs write them, and text that is not UTF-8."""

import json

CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Rome"}}}
CHAT = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 C", "tool_call_id": "x"},
]
TOOLS_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>'+m.role+'\\n'+m.content}}{% if m.tool_calls %}{% for t in m.tool_calls %}"
    "{{'<tool_call>'+(t.function.arguments|tojson)+'</tool_call>'}}{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}{% endfor %}"
    "{{'<|im_start|>assistant\\n'}}"
)


def write(work, name, *rows):
    (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={name}"


def test_half_of_a_character(work):
    data = write(work, "s.jsonl", *[{"question": "1+2 \ud83d", "answer": "3"}] * 4)
    sentence = "s.jsonl:1: `question` has half of a character (U+D83D at position 5)"
    assert sentence in work.refused("config", "base.yaml", data)
    assert sentence in work.refused("train", "base.yaml", data)
    assert sentence in work.refused("eval", "--model", "model", "--data", "s.jsonl")
    assert "QUESTION has half of a character" in work.refused("generate", "--model", "model", "1+2 \udcff")
    assert "modes.high_entropy_prompt" in work.refused("config", "base.yaml", "modes.high_entropy_prompt=\udcff")


def test_files_of_other_programs(work):
    (work / "deep.jsonl").write_bytes(b'{"a":' * 200_000 + b"1" + b"}" * 200_000)
    assert "deep.jsonl:1 is nested too deeply" in work.refused("config", "base.yaml", "data.path=deep.jsonl")
    data = write(work, "text.jsonl", *[{"prompt": json.dumps(CHAT), "answer": "3"}] * 4)
    assert "`prompt` is a list of messages written as text" in work.refused("config", "base.yaml", data)
    data = write(work, "null.jsonl", *[{"question": None, "answer": "3"}] * 4)
    assert "null.jsonl:1: `question` is null" in work.refused("config", "base.yaml", data)


def test_messages_of_tools_reach_the_template(work):
    data = write(work, "tools.jsonl", *[{"messages": CHAT, "answer": "21"}] * 4)
    assert "never writes `tool_calls`" in work.refused("config", "base.yaml", data)
    (work.copy_model("tooled") / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    named = [{**message, "name": "w"} for message in CHAT]
    data = write(work, "named.jsonl", *[{"messages": named, "answer": "21"}] * 4)
    assert "never writes `name`" in work.refused("config", "base.yaml", data, "model.path=tooled")
    data = write(
        work, "tools.jsonl", *[{"messages": CHAT[:2] + [{"role": "tool", "content": "21 C"}], "answer": "21"}] * 4
    )
    printed = work.accepted("config", "base.yaml", data, "model.path=tooled")
    assert '<tool_call>{"city": "Rome"}</tool_call>' in printed
