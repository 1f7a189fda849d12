"""Text from tokens: nothing lost, nothing halved, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from seallmd.api.detokenize import Detokenizer, StopStrings, special_ids
from tests.api.engine_double import byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
VOCAB = BYTE_LEVEL.get_vocab_size()
TEXTS = st.text(st.sampled_from("aé日語👩👧\u200d\u0301 \n☃"), max_size=30)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 has it: spaces are ▁, unknown characters are bytes, the first space is stripped."""
    tokens = ["<unk>", "<s>", "▁", "a", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_FALLBACK = byte_fallback_tokenizer()


def pieces(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, VOCAB + 5), max_size=80))
def test_random_tokens(tokens: list[int]) -> None:
    """The joined pieces are the decoding of all tokens, less an unfinished character at the very end.

    Random ids are mostly invalid UTF-8: exactly where window methods lose or repeat text.
    """
    got = "".join(pieces(Detokenizer(BYTE_LEVEL, skip=special_ids(BYTE_LEVEL)), tokens))
    whole = BYTE_LEVEL.decode(tokens)
    assert whole.startswith(got)
    assert len(whole) - len(got) <= 3
    assert set(whole[len(got) :]) <= {"\ufffd"}


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK]))
def test_whole_characters(prompt: str, text: str, tokenizer: Tokenizer) -> None:
    """Valid text comes out as it is, no piece holds a part of a character, a prompt before it or not."""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    plain = pieces(Detokenizer(tokenizer), tokens)
    assert "".join(plain) == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in plain)
    before = tokenizer.encode(prompt, add_special_tokens=False).ids
    primed = pieces(Detokenizer(tokenizer, before), tokens)
    whole = tokenizer.decode([*before, *tokens])
    assert "".join([tokenizer.decode(before), *primed]) == whole
    assert not any("\ufffd" in piece for piece in primed)


def test_leading_space_follows_the_prompt() -> None:
    """After a prompt the first word keeps its space; at the start of a text it loses it."""
    word = BYTE_FALLBACK.token_to_id("▁a")
    bos = BYTE_FALLBACK.token_to_id("<s>")
    skip = special_ids(BYTE_FALLBACK)
    assert "".join(pieces(Detokenizer(BYTE_FALLBACK, [bos, word], skip=skip), [word, word])) == " a a"
    assert "".join(pieces(Detokenizer(BYTE_FALLBACK, [bos], skip=skip), [word, bos, word])) == "a a"


def test_long_byte_run_before_the_output() -> None:
    """A prompt that ends in many byte tokens: a window cut inside a character makes all of it invalid."""
    before = BYTE_FALLBACK.encode("👩👩👩👩👩", add_special_tokens=False).ids
    after = BYTE_FALLBACK.encode("👩a", add_special_tokens=False).ids[1:]  # less the ▁ that starts a text
    assert "".join(pieces(Detokenizer(BYTE_FALLBACK, before), after)) == "👩a"


def test_prompt_may_end_inside_a_character() -> None:
    """A character begun in the prompt (given as ids) is completed in the output."""
    tokens = BYTE_LEVEL.encode("a👩", add_special_tokens=False).ids
    got = pieces(Detokenizer(BYTE_LEVEL, tokens[:-1]), tokens[-1:])
    assert "".join(got) == "👩"


def test_endless_garbage_keeps_flowing() -> None:
    """Invalid bytes come out soon and the window stays short: held back they would cost n squared."""
    stray = BYTE_LEVEL.token_to_id(BYTE_LEVEL.encode("é", add_special_tokens=False).tokens[-1][-1])
    detokenizer = Detokenizer(BYTE_LEVEL)
    got = "".join(detokenizer.push(stray) for _ in range(500))
    assert 496 <= len(got) <= 500
    assert len(detokenizer._window) < 32


def test_window_stays_short() -> None:
    """A long text costs no more per token than a short one."""
    detokenizer = Detokenizer(BYTE_LEVEL)
    for token in BYTE_LEVEL.encode("a wörld 日本 " * 50, add_special_tokens=False).ids:
        detokenizer.push(token)
        assert len(detokenizer._window) < 16


def test_special_tokens_can_be_kept() -> None:
    """Without `skip` special tokens are part of the text."""
    assert "".join(pieces(Detokenizer(BYTE_LEVEL), [0, 1])) == "<s></s>"
    assert "".join(pieces(Detokenizer(BYTE_LEVEL, skip=special_ids(BYTE_LEVEL)), [0, 1])) == ""


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 20), max_size=5),
    st.booleans(),
)
def test_stop_strings(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    """However the text is cut, it ends at the stop string that is complete first, and shows no part of it."""
    ends = [(end, -len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    expected = text
    if ends:
        end, size = min(ends)
        expected = text[: end if include else end + size]
    matcher = StopStrings(stops, include=include)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = ""
    for start, end in pairwise(edges):
        shown += matcher.push(text[start:end])
        assert expected.startswith(shown)
    assert shown + matcher.flush() == expected
    assert matcher.stopped == bool(ends)


@pytest.mark.parametrize(
    ("text", "shown"), [("x</to", "x"), ("x</tox", "x</tox"), ("x<<", "x<"), ("</tool>", "")]
)
def test_what_may_become_a_stop_string_is_held_back(text: str, shown: str) -> None:
    """Text that could be the start of a stop string is not streamed before that is settled."""
    assert StopStrings(["</tool>"]).push(text) == shown
