"""Which servers are the ones a run needs, asked over HTTP of a server that answers as it is told."""

import asyncio
import copy
import json

import pytest
from aiohttp import web

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable, SglangClient
from megatron_policysplit.serving.identity import PROBE, SPARE_TOKENS, Identity, check_identity
from megatron_policysplit.serving.members import Member, Placement

WANTED = Identity("qwen3", [5, 6, 7], 100, {"model_type": "qwen3", "num_hidden_layers": 2, "head_dim": None})
ANSWERS = {
    "/model_info": {"model_type": "qwen3", "model_path": "/models/theirs", "weight_version": "default"},
    "/tokenize": {"tokens": [5, 6, 7], "count": 3},
    "/v1/models": {"data": [{"id": "theirs", "max_model_len": 100 + SPARE_TOKENS}]},
    "/server_info": {"tp_size": 4, "dtype": "torch.bfloat16"},
}


def check(answers, asked=None):
    """The member after a check against a server with these answers (an int is a status)."""

    async def answer(request):
        if asked is not None:
            asked.append((request.path, await request.json() if request.can_read_body else None))
        said = answers[request.path]
        return web.Response(status=said) if isinstance(said, int) else web.json_response(said)

    async def run():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        member = Member(Placement(0, 0, (0,)), SglangClient(f"http://127.0.0.1:{port}", timeout_seconds=20), 1)
        try:
            await check_identity(member, WANTED)
        finally:
            await member.client.close()
            await runner.cleanup()
        return member

    return asyncio.run(run())


def test_the_right_server_and_what_is_learned_of_it():
    asked = []
    member = check(ANSWERS, asked)
    assert (member.tensor, member.dtype) == (4, "torch.bfloat16")
    assert dict(asked)["/tokenize"] == {"prompt": PROBE, "add_special_tokens": False}


@pytest.mark.parametrize("length", [None, 100 + SPARE_TOKENS, 10**6])
def test_contexts_that_are_long_enough(length):
    check(ANSWERS | {"/v1/models": {"data": [{"id": "theirs", "max_model_len": length}]}})


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        (
            "/model_info",
            {"model_type": "llama"},
            r"serves /models/theirs of type llama, but model.path is of type qwen3",
        ),
        ("/tokenize", {"tokens": [5, 6]}, "another tokenizer than model.path: 2 ids against 3"),
        ("/tokenize", {"tokens": [5, 7, 6]}, "another tokenizer than model.path: 3 ids against 3"),
        (
            "/v1/models",
            {"data": [{"max_model_len": 99 + SPARE_TOKENS}]},
            r"context of 106 tokens, but data.max_prompt_tokens \+ rollout.max_response_tokens = 100, .* needs 7 more",
        ),
    ],
)
def test_what_differs_is_named(path, change, says):
    answers = copy.deepcopy(ANSWERS)
    answers[path] |= change
    with pytest.raises(EngineError, match=says) as error:
        check(answers)
    assert "http://127.0.0.1:" in str(error.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/model_info", "hello"),
        ("/model_info", [1]),
        ("/tokenize", {"ids": [5, 6, 7]}),
        ("/tokenize", None),
        ("/v1/models", {"data": []}),
        ("/v1/models", "hello"),
        ("/v1/models", {"data": [{"max_model_len": "long"}]}),
        ("/server_info", {"dtype": "auto"}),
    ],
)
def test_something_else_than_sglang(path, said):
    with pytest.raises(EngineError, match="http://127.0.0.1:.* does not answer as an SGLang server does"):
        check(ANSWERS | {path: said})


def test_refusals_and_silence_stay_what_they_are():
    with pytest.raises(EngineRefused, match="answered 401"):
        check(ANSWERS | {"/tokenize": 401})
    with pytest.raises(EngineUnreachable, match="answered 503"):
        check(ANSWERS | {"/server_info": 503})


class Tokenizer:
    def encode(self, text, add_special_tokens):
        assert (text, add_special_tokens) == (PROBE, False)
        return [9, 8]


def test_the_identity_of_a_run():
    identity = Identity.of({"model_type": "llama", "hidden_size": 8}, Tokenizer(), 50)
    assert (identity.model_type, identity.probe_ids, identity.tokens) == ("llama", [9, 8], 50)
    assert identity.sizes["hidden_size"] == 8 and identity.sizes["vocab_size"] is None


def test_a_model_of_another_size_is_told_where_its_directory_can_be_read(tmp_path):
    def served(**config):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
        info = ANSWERS["/model_info"] | {"model_path": str(tmp_path)}
        return check(ANSWERS | {"/model_info": info})

    served(num_hidden_layers=2, head_dim=7)  # what one side does not say is no difference
    with pytest.raises(EngineError, match="num_hidden_layers=3, but model.path has 2"):
        served(num_hidden_layers=3)
