"""Replies under a grammar: they parse, whatever the arrangement; masks and logprobs are what they say."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve import LLM, SamplingParams
from agentserve.control import mask
from agentserve.control.grammar import GrammarCompiler
from agentserve.core import State

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["grep", "print"]}, "count": {"enum": [1, 22, 333]}, "on": {"type": "boolean"}},
    "required": ["name", "count", "on"],
    "additionalProperties": False,
}
TAG = json.dumps(
    {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": SCHEMA, "max_whitespace_cnt": 1}}
)


@pytest.fixture(scope="module")
def info():
    from transformers import AutoTokenizer

    from agentserve.demo import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=1024).serialize_json()


def run(llm: LLM, requests: dict[str, tuple[list[int], SamplingParams, Future | None]]) -> dict[str, SimpleNamespace]:
    for name, (prompt, params, grammar) in requests.items():
        llm.scheduler.add(name, np.array(prompt, np.int32), params, grammar=grammar)
    said = {name: SimpleNamespace(ids=[], logprobs=[], unmasked=[], end=None, error=None) for name in requests}
    while llm.scheduler.has_work:
        for output in llm.scheduler.step():
            one = said[output.request_id]
            one.ids += output.token_ids
            one.logprobs += output.logprobs
            one.unmasked += output.unmasked_logprobs
            one.end, one.error = output.finish_reason, output.error
        llm.scheduler.check()
    return said


def workload(compiler: GrammarCompiler, stops: tuple[int, ...]) -> dict:
    requests = {}
    for i in range(12):
        params = SamplingParams(temperature=1.5, seed=i, max_tokens=120, logprobs=0)
        requests[f"r{i}"] = [7 + i] * 20, params, compiler.grammar(TAG, stops) if i % 3 else None
    return requests


def test_every_reply_is_valid_and_does_not_depend_on_the_arrangement(info):
    compiler = GrammarCompiler(info, 1024)
    results = []
    for arrangement in ({}, {"overlap": False}, {"page_size": 1}, {"kv_tokens": 320}, {"max_batch_tokens": 16}):
        with LLM("demo", **{"dtype": "float32", "kv_tokens": 4096, "max_model_len": 200} | arrangement) as llm:
            stops = tuple(llm.scheduler.eos_ids)
            said = run(llm, workload(compiler, stops))
            results.append({name: one.ids for name, one in said.items()})
            if "kv_tokens" in arrangement:
                assert llm.stats().retractions > 0
            ended = 0
            for i, one in enumerate(said.values()):
                assert one.error is None
                if i % 3 and one.end == "stop":
                    ended += 1
                    assert one.ids[-1] in stops
                    reply = json.loads(llm.tokenizer.decode(one.ids[:-1]))
                    assert set(reply) == {"name", "count", "on"}
                    assert reply["name"] in ("grep", "print")
                    assert reply["count"] in (1, 22, 333)
            assert ended >= 4
    assert all(result == results[0] for result in results[1:])


def test_logprobs_under_the_mask_and_without(info):
    compiler = GrammarCompiler(info, 1024)
    with LLM("demo", dtype="float32", kv_tokens=2048, max_model_len=200) as llm:
        said = run(llm, workload(compiler, tuple(llm.scheduler.eos_ids)))
    for i, one in enumerate(said.values()):
        assert len(one.logprobs) == len(one.ids)
        assert len(one.unmasked) == (len(one.ids) if i % 3 else 0)
        assert all(masked >= free - 1e-5 for masked, free in zip(one.logprobs, one.unmasked, strict=False))


def test_a_bad_grammar_refuses_its_request_alone(info):
    compiler = GrammarCompiler(info, 1024)
    free = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM("demo", dtype="float32", kv_tokens=512) as llm:
        said = run(llm, {"bad": ([1], free, compiler.grammar("{}", ())), "good": ([1], free, None)})
    assert said["bad"].end == "refused"
    assert "cannot be compiled" in said["bad"].error
    assert len(said["good"].ids) == 4


def test_a_request_can_be_aborted_while_its_grammar_compiles():
    never: Future = Future()
    with LLM("demo", dtype="float32", kv_tokens=512) as llm:
        llm.scheduler.add("a", np.array([1], np.int32), SamplingParams(), grammar=never)
        assert llm.scheduler.step() == []
        llm.scheduler.abort("a")
        assert [output.finish_reason for output in llm.scheduler.step()] == ["abort"]
        llm.scheduler.check()


def test_a_vocabulary_of_another_size_is_refused(info):
    with pytest.raises(ValueError, match="the vocabulary has 1024 tokens, the model 99"):
        GrammarCompiler(info, 99)
    with pytest.raises(ValueError, match="cannot be read"):
        GrammarCompiler("nonsense", 1024)


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 130), rows=st.integers(1, 5), masked=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_masks_do_what_their_bits_say_and_leave_other_rows_alone(vocab, rows, masked, seed):
    rng = np.random.default_rng(seed)
    index = sorted(rng.permutation(rows)[:masked].tolist())
    allowed = rng.random((len(index), -(-vocab // 32) * 32)) < 0.5
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(rows, vocab)
    want = logits.clone()
    want[index] = want[index].masked_fill(torch.from_numpy(~allowed[:, :vocab]), float("-inf"))
    mask.apply(logits, bits, index)
    assert torch.equal(logits, want)


def test_rows_of_ended_requests_are_left_free():
    class Broken:
        complete = False

        def fill(self, bits):
            raise AssertionError("an ended reply was asked for its mask")

    ended = SimpleNamespace(grammar=Broken(), state=State.FINISHED)
    masks = mask.StepMasks((0,), (ended,), 40)
    masks.fill()
    assert (masks.wait() == -1).all()
