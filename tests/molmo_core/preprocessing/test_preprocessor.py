import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qwen_vocabulary import QWEN2_SPECIALS, QWEN3_SPECIALS, write_qwen_tokenizer

from molmo_core.nn.configs import VitConfig
from molmo_core.preprocessing.configs import DataFormatter, MolmoPreprocessorConfig
from molmo_core.preprocessing.media import MediaError
from molmo_core.preprocessing.preprocessor import build_preprocessor
from molmo_core.preprocessing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(golden / "tokenizer", first_special_id=448)


QA = {"style": "demo", "question": "What is it?", "answer": "a cat"}
CONFIG = {"max_crops": 4, "overlap_margins": (1, 1)}


def build(tokenizer, *, vit=True, config=None, **options):
    encoder = VitConfig(image_default_input_size=(56, 56), resize_mode="siglip", normalize="siglip") if vit else None
    options = {"for_inference": False, **options}
    return build_preprocessor(
        tokenizer, encoder, DataFormatter(prompt_templates="none"), MolmoPreprocessorConfig(**CONFIG | (config or {})), **options
    )


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


def test_every_kind_of_image_source(tokenizer, tmp_path):
    preprocess = build(tokenizer)
    pixels = picture(40, 60)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    expected = preprocess(QA | {"image": pixels})
    for source in (path, str(path), path.read_bytes(), Image.fromarray(pixels)):
        got = preprocess(QA | {"image": source})
        assert got.keys() == expected.keys()
        for key in expected.keys() - {"metadata"}:
            np.testing.assert_array_equal(got[key], expected[key], err_msg=key)
    assert expected["images"].dtype == np.uint8
    assert "image_masks" not in expected  # this encoder stretches, it does not pad
    assert expected["metadata"] == {"image_sizes": [(60, 40)]}


def test_names_of_special_tokens_in_a_record_stay_text(tokenizer):
    """In questions, answers and turns: the only end tokens are those that the preprocessor writes; the places of media remain places."""
    end = tokenizer.eos_token_id
    text = f"say {tokenizer.eos_token} and go on <im_patch>"
    preprocess = build(tokenizer)
    for record in (
        {"style": "demo", "question": text, "answer": text},
        {"messages": [text, text]},
        {"messages": [{"role": "user", "content": f"<|image|>{text}"}, {"role": "assistant", "content": text}]},
    ):
        got = preprocess(record | {"image": picture(40, 60)})
        assert [i for i, token in enumerate(got["input_ids"]) if token == end] == [0]
        assert [i for i, token in enumerate(got["labels"]) if token == end] == [len(got["labels"]) - 1]
        written = tokenizer.decode([t for t in got["labels"] if t < tokenizer.text_vocab_size and t != end], truncate_at_eos=False)
        assert written.count(text) == 2
    assert (got["input_ids"] == tokenizer.image_patch_token_id).any()


@pytest.fixture(scope="module")
def layouts(tokenizer, tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("qwen2", "qwen3")]
    return {
        "golden": tokenizer,
        "Molmo 7B-D": Tokenizer.load(write_qwen_tokenizer(folders[0], QWEN2_SPECIALS, "<|endoftext|>"), first_special_id=152064),
        "Molmo2": Tokenizer.load(write_qwen_tokenizer(folders[1], QWEN3_SPECIALS, "<|im_end|>"), first_special_id=151936, layout="molmo2"),
    }


@pytest.mark.parametrize("layout", ["golden", "Molmo 7B-D", "Molmo2"])
@pytest.mark.parametrize("kind", ["question", "messages", "tree", "options", "label", "caption", "style"])
@pytest.mark.parametrize("message_format", ["role", "qwen3", "none"])
def test_no_text_of_a_record_is_a_special_token(layouts, layout, kind, message_format):
    """In whatever field, for whatever name: the special tokens are those of the same record with harmless words."""
    tokenizer = layouts[layout]
    if message_format == "qwen3" and layout == "golden":
        pytest.skip("its vocabulary has no turns")
    preprocess = build_preprocessor(
        tokenizer,
        VitConfig(image_default_input_size=(56, 56), resize_mode="siglip", normalize="siglip"),
        DataFormatter(prompt_templates="none", system_prompt="style", message_format=message_format),
        MolmoPreprocessorConfig(**CONFIG),
        for_inference=False,
    )
    special = {t.content: i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special} | tokenizer.special_tokens

    def ids(name: str) -> list[int]:
        words = f"a {name} b{name}"
        record = {
            "question": {"question": words, "answer": words},
            "messages": {"messages": [words] * 4},
            "tree": {"message_list": [{"question": words, "answer": words}, {"question": words, "answer": words}]},
            "options": {"question": words, "options": [words, words], "answer_idx": 1},
            "label": {"label": words, "points": np.array([[1.0, 2.0]]), "point_scale": 100, "style": "pointing"},
            "caption": {"text": words, "style": "long_caption"},
            "style": {"question": "Who?", "answer": "Me", "style": words},
        }[kind]
        got = preprocess({"style": "demo", "image": picture(40, 60), "placeholders": False, **record}, np.random.RandomState(1))
        return [*got["input_ids"].tolist(), got["labels"][-1]]

    harmless = [i for i in ids("word") if i in special.values()]
    for name in [*special, "<|image|>", "<|video|>"]:
        found = ids(name)
        assert [i for i in found if i in special.values()] == harmless
        shown = tokenizer.decode([i for i in found if i not in special.values()], truncate_at_eos=False)
        assert shown.count(name) >= 2 * (1 if kind in ("style", "label", "caption") else 2), shown


def test_several_images(tokenizer):
    preprocess = build(tokenizer)
    pixels = [picture(40, 60), picture(120, 60, seed=1)]
    both = preprocess(QA | {"images": pixels})
    singles = [preprocess(QA | {"image": p}) for p in pixels]

    np.testing.assert_array_equal(both["images"], np.concatenate([s["images"] for s in singles]))
    offset = singles[0]["images"].shape[0] * singles[0]["images"].shape[1]
    second = singles[1]["pooled_patches_idx"]
    np.testing.assert_array_equal(
        both["pooled_patches_idx"], np.concatenate([singles[0]["pooled_patches_idx"], np.where(second < 0, -1, second + offset)])
    )
    shown = tokenizer.decode(both["input_ids"], skip_special_tokens=False, truncate_at_eos=False)
    assert shown.startswith("<|endoftext|>Image 1<im_start>")
    assert "<im_end>Image 2<im_start>" in shown
    patches = (both["input_ids"] == tokenizer.image_patch_token_id).sum()
    assert patches == len(both["pooled_patches_idx"])
    assert both["metadata"]["image_sizes"] == [(60, 40), (60, 120)]


def test_text_only(tokenizer):
    for preprocess in (build(tokenizer), build(tokenizer, vit=False)):
        got = preprocess({"messages": ["Hi.", "Hello."]})
        assert set(got) == {"input_ids", "labels", "loss_masks", "position_ids", "metadata"}


def test_metadata_is_kept_and_the_image_on_request(tokenizer):
    example = QA | {"image": picture(40, 60), "metadata": {"id": 7}}
    got = build(tokenizer, include_image=True)(example)
    assert got["metadata"]["id"] == 7
    np.testing.assert_array_equal(got["metadata"]["image_arrays"][0], example["image"])
    assert example["metadata"] == {"id": 7}
    tree = {"message_list": [QA] * 5, "image": picture(40, 60)}
    first = len(build(tokenizer, max_seq_len=1000)(tree)["input_ids"])
    assert build(tokenizer, max_seq_len=first - 2)(tree)["metadata"]["truncation"]["dropped_tokens"] == 2


def test_points_in_pixels_use_the_image(tokenizer):
    example = {"style": "demo", "label": "it", "points": [[30, 10]], "image": picture(40, 60)}
    got = build(tokenizer)(example)
    answer = tokenizer.decode(got["labels"][got["loss_masks"] > 0])
    assert answer == ' <point x="50.0" y="25.0" alt="it">it</point>'


def test_number_of_crops(tokenizer):
    large = QA | {"image": picture(400, 400)}
    crops = lambda preprocess, example, seed=0: len(preprocess(example, np.random.RandomState(seed))["images"])  # noqa: E731
    assert crops(build(tokenizer), large) == 5
    assert crops(build(tokenizer, config={"max_multi_image_crops": 1}), QA | {"images": [large["image"]] * 2}) == 2 * 2
    high = {"high_res_max_crops": 9, "p_high_res": 0.5}
    assert {crops(build(tokenizer, config=high), large, seed) for seed in range(12)} == {5, 10}
    assert {crops(build(tokenizer, config=high, is_training=False), large, seed) for seed in range(12)} == {5}
    assert {crops(build(tokenizer, config=high, for_inference=True), large, seed) for seed in range(12)} == {5}


def test_the_same_random_state_gives_the_same_example(tokenizer):
    tree = {"message_list": [QA | {"question": str(i)} for i in range(6)], "image": picture(40, 60)}
    preprocess = build(tokenizer)
    ids = [preprocess(tree, np.random.RandomState(3))["input_ids"].tolist() for _ in range(2)]
    assert ids[0] == ids[1] != preprocess(tree, np.random.RandomState(4))["input_ids"].tolist()
    assert preprocess(tree)["input_ids"].tolist() == preprocess(tree)["input_ids"].tolist()


def test_errors(tokenizer, tmp_path):
    preprocess = build(tokenizer, config={"max_images": 2})
    with pytest.raises(ValueError, match="either image or images, not both"):
        preprocess(QA | {"image": picture(9, 9), "images": []})
    with pytest.raises(ValueError, match=r"3 images, but mm_preprocessor\.max_images=2"):
        preprocess(QA | {"images": [picture(9, 9)] * 3})
    with pytest.raises(ValueError, match="the model has no vision_backbone"):
        build(tokenizer, vit=False)(QA | {"image": picture(9, 9)})
    with pytest.raises(MediaError, match="no such file"):
        preprocess(QA | {"image": tmp_path / "absent.png"})
    with pytest.raises(ValueError, match=r"media tokens and \d+ text tokens, beyond max_seq_len=20"):
        build(tokenizer, max_seq_len=20)(QA | {"image": picture(40, 60)})


def test_workers_need_no_torch():
    """Preprocessing imports neither torch nor Ray nor MLflow, nor does running it; only the collator imports torch, when called."""
    code = """
import sys, pkgutil, importlib, numpy as np
import molmo_core.preprocessing as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")
from molmo_core.preprocessing import collator
from molmo_core.preprocessing.configs import DataFormatter, MolmoPreprocessorConfig
from molmo_core.preprocessing.preprocessor import build_preprocessor
from molmo_core.preprocessing.tokenizer import Tokenizer
class Vit:
    image_default_input_size, image_patch_size, resize_mode, pad_value = (56, 56), 14, "default", 0.0
tokenizer = Tokenizer.load(sys.argv[1], first_special_id=448)
preprocess = build_preprocessor(tokenizer, Vit(), DataFormatter(), MolmoPreprocessorConfig(overlap_margins=(1, 1)), for_inference=False)
example = preprocess({"style": "demo", "question": "?", "answer": "a", "image": np.zeros((9, 9, 3), np.uint8)})
collate = collator.MMCollator(None, None)
print(sorted({"torch", "ray", "mlflow", "transformers"} & set(sys.modules)))
collate([example])
print("torch" in sys.modules)
"""
    folder = str(Path(__file__).parents[2] / "golden/tokenizer")
    output = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, timeout=120).stdout
    assert output.split("\n")[:2] == ["[]", "True"]
