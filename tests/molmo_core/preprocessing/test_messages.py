import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_core.preprocessing.messages import Annotation, MediaTokens, MessageWeight, assemble_sequence
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.tokens import SHARED_SEGMENT

MEDIA = [MediaTokens(np.arange(448, 452)), MediaTokens(np.array([448, 450, 450, 449]))]
WORDS = st.text("abc dé.", min_size=1, max_size=12)
CONVERSATION = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3).map(lambda pairs: [m for pair in pairs for m in pair])


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(golden / "tokenizer", first_special_id=448)


def shape_of(sequence):
    return {k: (v.dtype, v.shape) for k, v in sequence.items()}


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, truncate_at_eos=False)


def test_a_conversation(tokenizer):
    got = assemble_sequence(tokenizer, [Annotation(["a", " b", " c", " d e"])], MEDIA[:1])
    assert text(tokenizer, got["input_ids"]) == "<|endoftext|><im_start><im_end><im_patch><im_col>a b<|endoftext|> c d e"
    learnt = got["labels"][got["loss_masks"] == 1]
    assert text(tokenizer, learnt) == " b<|endoftext|> d e<|endoftext|>"
    assert set(got["loss_masks"].tolist()) == {0.0, 1.0}
    assert got["position_ids"].tolist() == list(range(len(got["input_ids"])))
    size = len(got["input_ids"])
    assert shape_of(got) == {
        "input_ids": (np.int64, (size,)),
        "labels": (np.int64, (size,)),
        "loss_masks": (np.float32, (size,)),
        "position_ids": (np.int64, (size,)),
    }


@settings(max_examples=60)
@given(st.lists(CONVERSATION, min_size=2, max_size=5), st.integers(0, 2))
def test_a_tree_is_its_conversations_side_by_side(tokenizer, conversations, media_count):
    media = MEDIA[:media_count]
    prefix = 1 + sum(len(m.ids) for m in media)
    tree = assemble_sequence(tokenizer, [Annotation(c) for c in conversations], media, weighting="root_subsegments")
    shared = tree["subsegment_ids"] == SHARED_SEGMENT
    assert shared.sum() == prefix
    assert shared[:prefix].all()
    for k, conversation in enumerate(conversations):
        alone = assemble_sequence(tokenizer, [Annotation(conversation)], media)
        mine = tree["subsegment_ids"] == k
        for key in ("input_ids", "labels", "position_ids"):
            np.testing.assert_array_equal(tree[key][mine], alone[key][prefix:], err_msg=key)
            np.testing.assert_array_equal(tree[key][: prefix - 1], alone[key][: prefix - 1], err_msg=key)
        np.testing.assert_allclose(tree["loss_masks"][mine], alone["loss_masks"][prefix:] * len(conversations) ** -0.5, rtol=1e-6)
    assert not tree["loss_masks"][shared].any()


def test_weights(tokenizer):
    answers = [" one", " two words here", " dogs"]
    lengths = [len(tokenizer.encode(a)) for a in answers]

    def weights(weighting, *own):
        annotations = [Annotation(["q", a], w) for a, w in zip(answers, own or [MessageWeight()] * 3)]
        got = assemble_sequence(tokenizer, annotations, weighting=weighting)
        found = [set(np.round(got["loss_masks"][got["subsegment_ids"] == k], 5)) - {0.0} for k in range(3)]
        assert all(len(f) == 1 for f in found)
        return [f.pop() for f in found]

    assert weights(None) == [1.0, 1.0, 1.0]
    third = 3**-0.5
    np.testing.assert_allclose(weights("root_subsegments"), [third] * 3, atol=1e-5)
    # End tokens do not count in a tree (golden molmo-point/a).
    expected = [third * 2 * n**-0.5 for n in lengths]
    np.testing.assert_allclose(weights("root_subsegments_root_tokens"), expected, atol=1e-5)
    own = (MessageWeight(0.2, root_subsegments=False, root_length=False), MessageWeight(0.5), MessageWeight(root_length=False))
    np.testing.assert_allclose(weights("root_subsegments_root_tokens", *own), [0.2, expected[1] / 2, third], atol=1e-5)
    np.testing.assert_allclose(weights(None, *[MessageWeight(root_length=True)] * 3), np.array(expected) / third, atol=1e-5)


def test_inference(tokenizer):
    got = assemble_sequence(tokenizer, [Annotation(["a", " b", " c"])], MEDIA[:1], for_inference=True)
    assert set(got) == {"input_ids", "position_ids"}
    assert text(tokenizer, got["input_ids"]) == "<|endoftext|><im_start><im_end><im_patch><im_col>a b<|endoftext|> c"
    begun = assemble_sequence(tokenizer, [Annotation(["a", " b"])], for_inference=True)
    assert text(tokenizer, begun["input_ids"]) == "<|endoftext|>a b"  # an answer to be continued has no end
    with pytest.raises(ValueError, match="message tree of 2"):
        assemble_sequence(tokenizer, [Annotation(["a"]), Annotation(["b"])], for_inference=True)


def test_media_inside_the_text(tokenizer):
    got = assemble_sequence(tokenizer, [Annotation(["Compare <|image|> and <|image|>.", " no"])], MEDIA)
    shown = "<|endoftext|>Compare <im_start><im_end><im_patch><im_col> and <im_start><im_patch><im_patch><im_end>. no"
    assert text(tokenizer, got["input_ids"]) == shown
    assert text(tokenizer, got["labels"][got["loss_masks"] > 0]) == " no<|endoftext|>"
    video = assemble_sequence(tokenizer, [Annotation(["See <|video|>."])], MEDIA[:1], for_inference=True)
    assert text(tokenizer, video["input_ids"]) == "<|endoftext|>See <im_start><im_end><im_patch><im_col>."


def test_positions_of_media(tokenizer):
    media = [MediaTokens(np.arange(448, 452), np.array([0, 1, 1, 9]))]
    got = assemble_sequence(tokenizer, [Annotation(["a<|image|>a", "a"])], media)
    assert got["position_ids"].tolist() == [0, 1, 2, 3, 3, 11, 12, 13]
    tree = assemble_sequence(tokenizer, [Annotation(["a", "a"]), Annotation(["a", "a"])], media)
    assert tree["position_ids"].tolist() == [0, 1, 2, 2, 10, 11, 12, 11, 12]


def test_truncation(tokenizer):
    annotations = [Annotation(["a", "a"]), Annotation(["a", "aaa"]), Annotation(["a", "a"])]
    assert [len(tokenizer.encode(t)) for t in ("a", "aaa")] == [1, 3]
    full = assemble_sequence(tokenizer, annotations, MEDIA[:1])
    assert len(full["input_ids"]) == 5 + 2 + 4 + 2
    assert "truncation" not in assemble_sequence(tokenizer, annotations, MEDIA[:1], max_seq_len=13)

    cut = assemble_sequence(tokenizer, annotations, MEDIA[:1], max_seq_len=12, weighting="root_subsegments")
    assert cut.pop("truncation") == {"dropped_annotations": 0, "dropped_tokens": 1}
    assert all(len(v) == 12 for v in cut.values())
    assert cut["labels"][-1] == tokenizer.encode("a")[0]  # its answer goes on: no end to learn
    assert cut["loss_masks"][-1] == pytest.approx(3**-0.5)

    fewer = assemble_sequence(tokenizer, annotations, MEDIA[:1], max_seq_len=11, weighting="root_subsegments")
    assert fewer.pop("truncation") == {"dropped_annotations": 1, "dropped_tokens": 0}
    assert fewer["labels"][-1] == tokenizer.eos_token_id
    assert fewer["loss_masks"][-1] == pytest.approx(2**-0.5)

    one = assemble_sequence(tokenizer, annotations, MEDIA[:1], max_seq_len=7)
    assert one.pop("truncation") == {"dropped_annotations": 2, "dropped_tokens": 0}
    assert "subsegment_ids" not in one

    short = assemble_sequence(tokenizer, annotations, MEDIA[:1], max_text_tokens=4)
    assert short.pop("truncation") == {"dropped_annotations": 1, "dropped_tokens": 2}
    assert len(short["input_ids"]) == 5 + 4


@settings(max_examples=60)
@given(st.lists(CONVERSATION, min_size=1, max_size=4), st.integers(1, 60))
def test_a_truncated_sequence_is_the_beginning_of_the_whole(tokenizer, conversations, limit):
    annotations = [Annotation(c) for c in conversations]
    whole = assemble_sequence(tokenizer, annotations)
    if 1 + len(tokenizer.encode(conversations[0][0])) > limit:
        with pytest.raises(ValueError, match="beyond max_seq_len"):
            assemble_sequence(tokenizer, annotations, max_seq_len=limit)
        return
    cut = assemble_sequence(tokenizer, annotations, max_seq_len=limit)
    size = len(cut["input_ids"])
    assert size <= limit
    assert cut["loss_masks"].any()
    for key in ("input_ids", "position_ids"):
        np.testing.assert_array_equal(cut[key], whole[key][:size], err_msg=key)
    if size < len(whole["input_ids"]):
        assert set(cut["truncation"]) == {"dropped_annotations", "dropped_tokens"}


@pytest.mark.parametrize(
    ("conversations", "options", "message"),
    [
        ([], {}, "at least one message"),
        ([["a"]], {}, "ends with an answer, got 1 message"),
        ([["a <|image|>", "b"]], {}, "1 media placeholders, but the example has 0"),
        ([["a", "<|image|>"]], {}, "answer may not hold a media placeholder"),
        ([["a<|image|>", "b"], ["a", "b"]], {"media": MEDIA[:1]}, "cannot be combined with a message tree"),
        ([["a", "b"], ["a<|image|>", "b"]], {"media": MEDIA[:1]}, "may not stand in a later conversation"),
        ([["a a", "b"]], {"media": MEDIA, "max_seq_len": 9}, "8 media tokens and 2 text tokens, beyond max_seq_len=9"),
        ([["a", "b", "a<|image|>", "b"]], {"media": MEDIA[:1], "max_seq_len": 8}, "image in a later turn is beyond the limit of 8"),
        ([["a a", "b"]], {"max_text_tokens": 1}, "beyond max_text_tokens=1"),
        ([["a a"]], {"media": MEDIA, "max_seq_len": 10, "for_inference": True}, "11 tokens long \\(8 of images or video, 2 of text\\)"),
    ],
)
def test_errors(tokenizer, conversations, options, message):
    with pytest.raises(ValueError, match=message):
        assemble_sequence(tokenizer, [Annotation(c) for c in conversations], **options)


@given(pairs=st.lists(st.tuples(WORDS, WORDS, st.sampled_from([0.0, 0.5, 1.0, 2.0])), min_size=1, max_size=4), tree=st.booleans())
@settings(max_examples=50, deadline=None)
def test_turn_weights_multiply_the_loss_of_their_answers(tokenizer, pairs, tree):
    """The tokens stay; each answer, its end token included, has its turn's weight."""
    messages = [text for question, answer, _ in pairs for text in (question, answer)]
    factors = [weight for *_, weight in pairs]
    annotations = [Annotation(messages, MessageWeight(0.5)), Annotation(["x", "y"])][: 1 + tree]
    plain = assemble_sequence(tokenizer, annotations, MEDIA)
    annotations[0] = Annotation(messages, MessageWeight(0.5), [w for _, _, weight in pairs for w in (7.0, weight)])
    weighted = assemble_sequence(tokenizer, annotations, MEDIA)
    for name in plain.keys() - {"loss_masks"}:
        np.testing.assert_array_equal(plain[name], weighted[name])
    expected = plain["loss_masks"].copy()
    lengths = [len(tokenizer.encode(answer)) + 1 for _, answer, _ in pairs]  # with the end token
    first = np.flatnonzero(expected)[: sum(lengths)]
    expected[first] *= np.repeat(np.float32(factors), lengths)
    np.testing.assert_array_equal(weighted["loss_masks"], expected)


def test_an_untrained_answer_may_stand_before_the_limit(tokenizer):
    """What must lie within the limit is the first answer that is trained on."""
    conversation = ["a", " b", " c", " d"]
    trained = assemble_sequence(tokenizer, [Annotation(conversation, turn_weights=[0, 0, 0, 1])], max_seq_len=50)
    start = int(np.flatnonzero(trained["loss_masks"])[0])
    with pytest.raises(ValueError, match="the first answer would begin after"):
        assemble_sequence(tokenizer, [Annotation(conversation, turn_weights=[0, 0, 0, 1])], max_seq_len=start)
    assert assemble_sequence(tokenizer, [Annotation(conversation)], max_seq_len=start)["loss_masks"].any()
