"""Streamed text equals the whole text, however the tokens cut it."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.serving.text_stream import SETTLE_AFTER, TextStream


def decode_bytes(tokens: list[int]) -> str:
    """A tokenizer of single bytes: characters take up to four tokens."""
    return bytes(tokens).decode("utf-8", errors="replace")


def stream(text: str, stops: list[str]) -> tuple[list[str], TextStream]:
    text_stream = TextStream(decode_bytes, stops)
    pieces = [text_stream.push(byte) for byte in text.encode()]
    return [*pieces, text_stream.finish()], text_stream


@given(st.text(max_size=30) | st.text(min_size=30, max_size=90))
def test_pieces_join_to_the_text(text):
    assert "".join(stream(text, [])[0]) == text.lstrip()


@given(st.lists(st.integers(0, 255), max_size=150) | st.lists(st.sampled_from([0x80, 0xF0, 0x9F, 0x99, 0x82, 0x61]), max_size=150))
def test_bytes_that_are_no_text(tokens):
    """As if all were decoded at once, whatever they are; and only little is decoded again for every token."""
    decoded = []

    def decode(tokens):
        decoded.append(len(tokens))
        return decode_bytes(tokens)

    text_stream = TextStream(decode, strip=False)
    pieces = [text_stream.push(token) for token in tokens]
    assert "".join([*pieces, text_stream.finish()]) == decode_bytes(tokens)
    assert max(decoded, default=0) <= 2 * SETTLE_AFTER


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_cut_at_the_first_stop(text, stops):
    """As soon as a stop string is complete, the answer ends before the earliest one."""
    pieces, text_stream = stream(text, stops)
    expected, stopped = text, False
    for end in range(len(text) + 1):
        positions = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if positions:
            expected, stopped = text[: min(positions)], True
            break
    assert "".join(pieces) == expected
    assert text_stream.stopped == stopped


def test_nothing_uncertain_is_sent():
    pieces, _ = stream("ab🙂c", [])
    assert pieces == ["a", "b", "", "", "", "🙂", "c", ""]
    pieces, _ = stream("xENy", ["END"])
    assert pieces == ["x", "", "", "ENy", ""]


@given(
    st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=3), min_size=1, max_size=2), st.integers(0, 9)
)
def test_a_stop_string_kept_and_the_least_length(text, stops, least):
    """Only a stop string that is complete with token number `least` or a later one ends the answer, here behind itself."""
    text_stream = TextStream(decode_bytes, stops, include_stop=True, min_tokens=least)
    sent = "".join([*(text_stream.push(byte) for byte in text.encode()), text_stream.finish()])
    ends = [end for end in range(max(least, 1), len(text) + 1) if text[:end].endswith(tuple(stops))]
    assert sent == (text[: ends[0]] if ends else text)
    assert text_stream.stopped == bool(ends)


def test_tokens_after_the_stop_are_ignored():
    text_stream = TextStream(decode_bytes, ["."])
    assert [text_stream.push(b) for b in b"ok.no"] == ["o", "k", "", "", ""]
    assert text_stream.stopped
    assert text_stream.finish() == ""
