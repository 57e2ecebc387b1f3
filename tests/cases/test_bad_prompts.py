"""Model directories as fine-tuning leaves them: stop tokens, tokenizers, chat templates, lengths."""

import json


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def test_a_turn_that_ends_with_a_token_of_the_tokenizer_alone(work):
    model = work.copy_model("m2")
    (model / "generation_config.json").unlink()
    edit(model / "config.json", eos_token_id=1)
    ask = ("--max-tokens", "12", "--seed", "1", "1+2")
    assert work.accepted("generate", "--model", "m2", *ask) == work.accepted("generate", "--model", "model", *ask)


def test_stop_tokens_that_are_no_ids(work):
    file = work.copy_model("m2") / "generation_config.json"
    for value in ("<|im_end|>", 2.0, [None], [[2]], {"a": 2}):
        edit(file, eos_token_id=value)
        sentence = f"m2/generation_config.json: eos_token_id={json.dumps(value)} is neither a token id nor a list of "
        assert sentence in work.refused("train", "base.yaml", "model.path=m2")
    assert sentence in work.refused("generate", "--model", "m2", "1+2")
    edit(file, eos_token_id=32)
    text = work.refused("train", "base.yaml", "model.path=m2")
    assert "m2/generation_config.json: eos_token_id=32 has the token id 32, which is outside the model's" in text


def test_a_prompt_with_a_token_that_the_model_has_no_embedding_for(work):
    tokenizer = work.copy_model("m2") / "tokenizer.json"
    added = json.loads(tokenizer.read_text())["added_tokens"]
    edit(tokenizer, added_tokens=[*added, {**added[0], "id": 32, "content": "hi", "special": False}])
    warning = "has 1 token that the model has no embedding for, such as 'hi' of id 32 with vocab_size=32"
    (work / "hi.jsonl").write_text('{"question": "1+2", "answer": "3"}\n' * 4 + '{"question": "hi", "answer": "3"}\n')
    sentence = "the normal prompt has the token 'hi' of id 32, and the embedding of m2 ends at"
    result = work.run("train", "base.yaml", "model.path=m2", "data.path=hi.jsonl")
    assert (
        result.returncode == 2
        and f"error: question 4 of hi.jsonl: {sentence}" in result.stderr
        and warning in result.stdout
    )
    prompt = ("--model", "m2", "--high-entropy-prompt", "explore")
    assert work.refused("eval", *prompt, "--data", "hi.jsonl", "--reward", "exact").startswith(
        f"error: question 4: {sentence}"
    )


def test_chat_templates_that_fail_and_arguments_that_are_wrong(work):
    template = work.copy_model("m2") / "chat_template.jinja"
    whole = template.read_text()
    template.write_text("{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    sentence = "error: the chat template of m2 does not render: TypeError: can only concatenate str"
    assert work.refused("generate", "--model", "m2", "1+2").startswith(sentence)
    template.write_text("{% if thinking_budget is defined and thinking_budget > 0 %}{% endif %}" + whole)

    def wrong(kwargs):
        return work.refused("config", "base.yaml", "model.path=m2", f"modes.chat_template_kwargs={kwargs}")

    assert "the chat template of m2 fails with it (TypeError: '>' not supp" in wrong('{thinking_budget: "512"}')
    # A training tells before it starts a process, which would say more on stderr.
    started = work.run("train", "base.yaml", "model.path=m2", "modes.chat_template_kwargs={thinking_budgt: 512}")
    assert started.returncode == 2 and not (work / "runs").exists()
    assert [line for line in started.stderr.splitlines() if line] == [
        "error: modes.chat_template_kwargs.thinking_budgt: the chat template of m2 never reads it; did you mean "
        "thinking_budget?"
    ]
    assert "thinking_budgt: the chat template of m2 never reads it; did you mean" in wrong("{thinking_budgt: 512}")
    assert "kwargs.messages is set by policysplit itself; remove it" in wrong("{messages: []}")


def test_a_directory_without_a_tokenizer(work):
    model = work.copy_model("m3")
    template = (model / "chat_template.jinja").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    sentence = "error: m3 has no tokenizer: tokenizer.json is missing (tokenizer.model, or vocab.json with merges.txt,"
    assert work.refused("train", "base.yaml", "model.path=m3").startswith(sentence)
    (model / "chat_template.jinja").write_text(template)
    assert work.refused("train", "base.yaml", "model.path=m3").startswith(sentence)
    assert work.refused("generate", "--model", "m3", "1+2").startswith(sentence)


def test_more_positions_than_the_model_has(work):
    lengths = ("data.max_prompt_tokens=600", "rollout.max_response_tokens=600")
    refused = work.refused("train", "base.yaml", *lengths)
    assert (
        "data.max_prompt_tokens=600 + rollout.max_response_tokens=600 = 1200 positions are more than the 1024"
        in refused
    )
    sentence = "error: --max-tokens 1024 behind a prompt of "
    refused = work.refused("eval", "--model", "model", "--data", "q.jsonl", "--max-tokens", "1024")
    assert refused.startswith(sentence) and "; use at most --max-tokens " in refused


def test_a_length_that_nobody_asked_for_fits_the_model(work):
    out = work / "scores.json"
    given = ("--data", "q.jsonl", "--reward", "exact", "--questions", "1", "--samples", "1")
    work.accepted("eval", "--model", "model", *given, "--output", str(out))
    assert 900 < json.loads(out.read_text())["max_tokens"] < 1000  # of 1,024 positions


def test_an_eos_token_that_no_file_of_the_tokenizer_holds(work):
    model = work.copy_model("m2")
    ask = ("--max-tokens", "12", "--seed", "1", "1+2")
    expected = work.accepted("generate", "--model", "model", *ask)
    edit(model / "tokenizer_config.json", eos_token="<|eos|>")
    assert work.accepted("generate", "--model", "m2", *ask) == expected  # generation_config.json names another
    edit(model / "generation_config.json", eos_token_id=[])
    edit(model / "config.json", eos_token_id=None)
    sentence = "error: the tokenizer's eos_token '<|eos|>' is in no file of m2 that holds tokens, so no response would"
    for command in (("config", "base.yaml", "model.path=m2"), ("generate", "--model", "m2", *ask)):
        assert work.refused(*command).startswith(sentence)
