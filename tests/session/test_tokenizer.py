"""Encoding, templates, and the detokenizer's promise: the pieces are the whole, stops are cut exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentserve.tokenizer import Detokenizer, Tokenizer, resolve_model_dir
from tests.session.tokenizer_kit import byte_fallback, byte_level, save

RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(alphabet=st.sampled_from('ab <>/{}"é你😀\n\u0301'), max_size=40)


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save(tmp_path_factory.mktemp("level"), byte_level()))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save(tmp_path_factory.mktemp("fallback"), byte_fallback(), "none"))


def pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    out, start = [], 0
    for cut in [*sorted({min(cut, len(ids)) for cut in cuts}), len(ids)]:
        out.append(ids[start:cut])
        start = cut
    return out


@RELAXED
@given(data=st.data())
def test_any_tokens_in_any_pieces_give_the_whole_text(level: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, level.vocab_size + 5), max_size=120))
    cuts = data.draw(st.lists(st.integers(0, 120), max_size=120))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(level, skip_special_tokens=skip)
    text = "".join([detokenizer.push(piece) for piece in pieces(ids, cuts)]) + detokenizer.finish()
    assert text == level.decode(ids, skip_special_tokens=skip)
    assert detokenizer.tokens_used == len(ids)


@RELAXED
@given(data=st.data())
def test_raw_bytes_one_token_at_a_time(level: Tokenizer, data: st.DataObject) -> None:
    """Invalid and incomplete UTF-8: long runs of bytes that never become a character."""
    single = [level._backend.token_to_id(c) for c in "ĠĊāĂ½åä¿ĳðŁĺĢ¤ÿþabc"]
    ids = data.draw(st.lists(st.sampled_from([i for i in single if i is not None]), max_size=150))
    detokenizer = Detokenizer(level)
    text = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.finish()
    assert text == level.decode(ids)


@RELAXED
@given(text=TEXT)
def test_fallback_bytes_and_leading_spaces(fallback: Tokenizer, text: str) -> None:
    ids = fallback.encode(text * 3, add_special_tokens=False)
    detokenizer = Detokenizer(fallback)
    out = "".join([detokenizer.push([i]) for i in ids]) + detokenizer.finish()
    assert out == fallback.decode(ids)


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the text is cut, the slow and plain way: grow it by a character until it ends with a stop."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return end - max(found)
    return None


@RELAXED
@given(text=TEXT, stops=st.lists(st.text(alphabet="ab <你😀", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_are_cut_exactly(level: Tokenizer, text: str, stops: list[str]) -> None:
    ids = level.encode(text)
    detokenizer = Detokenizer(level, stop=tuple(stops))
    out = ""
    for i in ids:
        out += detokenizer.push([i])
        assert all(stop not in out for stop in stops)
    out += detokenizer.finish()
    cut = first_stop(text, tuple(stops))
    assert detokenizer.stopped == (cut is not None)
    assert out == (text if cut is None else text[:cut])
    if cut is None:
        assert detokenizer.tokens_used == len(ids)
    else:
        used = detokenizer.tokens_used
        assert first_stop(level.decode(ids[:used]), tuple(stops)) is not None
        assert first_stop(level.decode(ids[: used - 1]), tuple(stops)) is None
    whole = Detokenizer(level, stop=tuple(stops))
    assert whole.push(ids) + whole.finish() == out
    assert whole.tokens_used == detokenizer.tokens_used


def test_text_is_given_as_soon_as_it_is_certain(level: Tokenizer) -> None:
    detokenizer = Detokenizer(level, stop=("END",))
    assert detokenizer.push(level.encode("hello E")) == "hello "
    assert detokenizer.push(level.encode("N")) == ""
    assert detokenizer.push(level.encode("O")) == "ENO"
    first, *rest = level.encode("ᛝ")
    assert detokenizer.push([first]) == ""
    assert detokenizer.push(rest) == "ᛝ"


def test_work_per_token_is_bounded(level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    decode = level.decode

    def counted(ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(level, "decode", counted)
    detokenizer = Detokenizer(level)
    (broken,) = [level._backend.token_to_id("ÿ")]
    for i in [broken] * 300 + level.encode("the quick brown fox ") * 50:
        detokenizer.push([i])
    assert 0 < longest <= 40


def test_marks_of_tool_calls_survive_where_they_are_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path, byte_level(special_marks=True)))
    ids = tokenizer.encode("<tool_call>x</tool_call><|im_end|>")
    assert Detokenizer(tokenizer).push(ids) == "x"
    assert Detokenizer(tokenizer, keep=("<tool_call>", "</tool_call>")).push(ids) == "<tool_call>x</tool_call>"


def test_eos_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    own = Tokenizer(tmp_path).special_tokens["<|im_end|>"]
    assert Tokenizer(tmp_path).eos_token_ids == (own,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, own, 9]}))
    assert Tokenizer(tmp_path).eos_token_ids == (7, own, 9)


def test_template_and_errors_say_what_is_wrong(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "m", byte_level(), "chatml"))
    assert tokenizer.render([{"role": "user", "content": "hi"}]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = Tokenizer(save(tmp_path / "plain", byte_level(), "none"))
    assert not plain.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        plain.render([{"role": "user", "content": "hi"}])
    strict = Tokenizer(save(tmp_path / "strict", byte_level(), "hermes"))
    with pytest.raises(ValueError, match="unknown role critic"):
        strict.render([{"role": "critic", "content": "hi"}])
    with pytest.raises(FileNotFoundError, match="no model directory at"):
        resolve_model_dir(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="bare holds no tokenizer"):
        Tokenizer(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve_model_dir(tmp_path / "empty")
