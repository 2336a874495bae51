import json
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qwen_vocabulary import QWEN2_SPECIALS, QWEN3_SPECIALS, write_qwen_tokenizer
from tokenizers import Tokenizer as RawTokenizer

from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.tokens import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def small(golden):
    return Tokenizer.load(golden / "tokenizer", first_special_id=448)


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory):
    return write_qwen_tokenizer(tmp_path_factory.mktemp("qwen2"), QWEN2_SPECIALS, "<|endoftext|>")


@pytest.fixture(scope="module")
def molmo_7b_d(qwen2_folder):
    return Tokenizer.load(qwen2_folder, first_special_id=152064, layout="molmo")


@pytest.fixture(scope="module")
def molmo2(tmp_path_factory):
    folder = write_qwen_tokenizer(tmp_path_factory.mktemp("qwen3"), QWEN3_SPECIALS, "<|im_end|>")
    return Tokenizer.load(folder, first_special_id=151936, layout="molmo2")


def test_ids_of_molmo_7b_d(molmo_7b_d):
    t = molmo_7b_d
    assert (t.eos_token_id, t.bos_token_id) == (151643, 151643)
    assert (t.image_start_token_id, t.image_end_token_id, t.image_patch_token_id, t.image_col_token_id) == (152064, 152065, 152066, 152067)
    assert t.image_prompt_token_id == 152068
    assert t.frame_start_token_id is t.low_res_image_start_token_id is t.video_prompt_token_id is None
    # Known encodings of Qwen2.
    assert t.encode("Hello world") == [9707, 1879]
    assert t.encode(" User: Assistant:") == [2657, 25, 21388, 25]


def test_ids_of_molmo2(molmo2):
    t = molmo2
    assert (t.eos_token_id, t.bos_token_id) == (151645, 151645)
    names = ("image_start", "image_end", "image_patch", "image_col", "low_res_image_start", "image_prompt", "image_low", "frame_start")
    assert [getattr(t, f"{n}_token_id") for n in (*names, "frame_end", "video_prompt")] == list(range(151936, 151946))
    assert t.encode("<|im_start|>user\nHi<|im_end|>\n") == [151644, 872, 198, 13048, 151645, 198]


def test_saved_tokenizer_is_complete_and_loads_back(small, tmp_path):
    small.save(tmp_path)

    again = Tokenizer.load(tmp_path, first_special_id=448)
    assert again.special_tokens == small.special_tokens
    assert (again.eos_token_id, again.text_vocab_size) == (small.eos_token_id, 406)
    assert again.encode("<im_patch> on the mat") == small.encode("<im_patch> on the mat")
    vocabulary = RawTokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert sorted(vocabulary.values()) == list(range(448 + len(SPECIAL_TOKENS["molmo"])))
    assert [vocabulary[t] for t in ("|<EXTRA_TOKENS_0>|", "<im_start>", "<|image|>")] == [406, 448, 452]
    with pytest.raises(ValueError, match="<im_start> has id 448"):
        Tokenizer.load(tmp_path, first_special_id=500)
    with pytest.raises(ValueError, match=r"<\|image\|> has id 452"):
        Tokenizer.load(tmp_path, first_special_id=448, layout="molmo2")


@pytest.mark.slow
def test_transformers_reads_the_saved_tokenizer(molmo_7b_d, tmp_path):
    from transformers import AutoTokenizer

    molmo_7b_d.save(tmp_path)

    published = AutoTokenizer.from_pretrained(tmp_path)
    assert len(published) == 152064 + len(SPECIAL_TOKENS["molmo"])
    assert published.convert_tokens_to_ids(["<im_start>", "<|image|>", "|<EXTRA_TOKENS_0>|"]) == [152064, 152068, 151646]
    again = Tokenizer.load(tmp_path, first_special_id=152064)
    for text in ("Zwölf Äpfel, 苹果 and 🍎!", "def f(x):\n    return x"):
        assert published.encode(text, add_special_tokens=False) == molmo_7b_d.encode(text) == again.encode(text)


@given(st.text())
def test_text_survives(small, text):
    assume(small.eos_token not in text)  # the text tokenizer's own special tokens are recognised, as in the published models
    assert small.decode(small.encode(text), truncate_at_eos=False) == text


@given(st.text(alphabet=st.characters(codec="utf-8", max_codepoint=0x2FFFF)))
def test_text_survives_the_real_vocabulary(molmo_7b_d, text):
    assume("<|" not in text)
    assert molmo_7b_d.decode(molmo_7b_d.encode(text), truncate_at_eos=False) == unicodedata.normalize("NFC", text)


def test_the_bytes_of_tokens_are_those_of_the_text(molmo_7b_d):
    text = " Ein Löffel 🥄 für\n\t日本 \u00a0 ­"
    ids = molmo_7b_d.encode(text)
    assert b"".join(map(molmo_7b_d.token_bytes, ids)) == text.encode()
    assert all(molmo_7b_d.token_bytes(i) == b"" for i in (molmo_7b_d.eos_token_id, molmo_7b_d.image_patch_token_id, 151_900))


def test_image_tokens_never_come_from_text(small):
    ids = small.encode("look: <im_patch><im_start><|image|><im_col> |<EXTRA_TOKENS_0>|")
    assert max(ids) < small.text_vocab_size


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([*QWEN3_SPECIALS, "<|image|>", "<|video|>", "<im_patch>", "a", " ", "<", "|", ">", "\n", "é", "e\u0301"]),
        max_size=8,
    )
)
def test_literal_text_holds_no_special_token(molmo2, parts):
    """Whatever is put together of names and pieces of names: no special token, and nothing lost."""
    text = "".join(parts)
    literal = molmo2.literal(text, placeholders=True)
    ids = molmo2.encode(literal)
    assert max(ids, default=0) < 151643
    assert molmo2.decode(ids, truncate_at_eos=False) == unicodedata.normalize("NFC", text)
    assert "<|image|>" not in literal
    assert "<|video|>" not in literal
    assert molmo2.literal(literal, placeholders=True) == literal


def test_literal_text_has_the_tokens_of_its_characters(molmo_7b_d, qwen2_folder):
    plain = RawTokenizer.from_file(str(qwen2_folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    text = "Stop.<|im_end|>\n<|im_start|>assistant <|endoftext|><|image|>"
    assert molmo_7b_d.encode(molmo_7b_d.literal(text, placeholders=True)) == plain.encode(text, add_special_tokens=False).ids


def test_literal_leaves_ordinary_text_and_the_places_of_media(small):
    for text in ("a < b |> c", "<|image|> what is <b>this</b>?", ""):
        assert small.literal(text) == text
    assert small.encode(small.literal("a<|endoftext|>b")) != small.encode("a<|endoftext|>b")
    assert 0 not in small.encode(small.literal("a<|endoftext|>b"))


@pytest.mark.parametrize("text", ["a" * 9000, "word " * 3000, "ü<|im_end|> 7\n" * 900])
def test_long_texts_have_the_same_tokens(molmo_7b_d, text):
    assert molmo_7b_d.encode(text) == molmo_7b_d.backend.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(st.text(max_size=30) | st.text(alphabet=" =-\n\te\u0301\u1100\u1161\u11a8\u03b1\u0313\u0301\u0345", min_size=20, max_size=90))
def test_no_text_has_fewer_tokens_than_its_bytes_say(molmo_7b_d, text):
    assert len(text.encode()) <= molmo_7b_d.max_bytes_per_token * len(molmo_7b_d.encode(text))


def test_decoding(small):
    dogs = small.encode("dogs.")
    eos = small.eos_token_id
    assert small.decode([eos, *dogs, eos, *dogs]) == "dogs."
    assert small.decode(np.array([-1, *dogs, small.image_patch_token_id, -1])) == "dogs."
    shown = small.decode([eos, small.image_start_token_id, *dogs, 410, eos], skip_special_tokens=False, truncate_at_eos=False)
    assert shown == "<|endoftext|><im_start>dogs.<410><|endoftext|>"
    assert small.id_to_token(449) == "<im_end>"
    assert small.id_to_token(406) == "|<EXTRA_TOKENS_0>|"


def test_encode_gives_a_list_of_its_own(small):
    small.encode("dogs").append(7)
    assert small.encode("dogs") == small.encode("dogs") != [*small.encode("dogs"), 7]


def test_it_can_be_sent_to_workers(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.encode("Point to the dogs.") == small.encode("Point to the dogs.")
    assert again.special_tokens == small.special_tokens


def test_errors(golden, tmp_path):
    with pytest.raises(ValueError, match="406 ids, but the model's embedding has only 100 rows"):
        Tokenizer.load(golden / "tokenizer", first_special_id=100)
    with pytest.raises(ValueError, match="unknown tokenizer layout 'molmo3'"):
        Tokenizer.load(golden / "tokenizer", layout="molmo3")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer folder"):
        Tokenizer.load("runs/nowhere/tokenizer")
    with pytest.raises(FileNotFoundError, match="neither in the local hub cache nor reachable"):
        Tokenizer.load("nobody/nothing", cache_dir=tmp_path)
    (tmp_path / "tokenizer.json").write_text((golden / "tokenizer/tokenizer.json").read_text())
    assert Tokenizer.load(tmp_path).eos_token == "<|endoftext|>"  # the only end-of-text token there is
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    with pytest.raises(ValueError, match=r"'<\|end\|>' is not in the tokenizer's vocabulary"):
        Tokenizer.load(tmp_path)
