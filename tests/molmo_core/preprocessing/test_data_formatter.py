"""What the golden records do not cover: templates, Molmo2's formats and styles, weights, and errors."""

import numpy as np
import pytest

from molmo_core.preprocessing.configs import DataFormatter
from molmo_core.preprocessing.data_formatter import Formatter
from molmo_core.preprocessing.messages import MessageWeight


def messages(record, seed=0, for_inference=False, is_training=True, image_sizes=(), **config):
    config = {"prompt_templates": "none", "message_format": "none", "system_prompt": "none", **config}
    formatter = Formatter(DataFormatter(**config))
    rng = np.random.RandomState(seed)
    annotations = formatter(record, rng, for_inference=for_inference, is_training=is_training, image_sizes=image_sizes)
    return list(annotations[0].messages)


QA = {"style": "vqa2", "question": "What is it?", "answer": "a cat"}


def test_message_formats():
    conversation = {"messages": ["a", "b", "c", "d"]}
    assert messages(conversation) == ["a", " b", " c", " d"]
    assert messages(conversation, message_format="role") == ["User: a Assistant:", " b", " User: c Assistant:", " d"]
    assert messages(conversation, message_format="role", always_start_with_space=True)[0] == " User: a Assistant:"
    assert messages(conversation, message_format="qwen3") == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b",
        "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        "d",
    ]
    assert messages(QA, image_last=True, image_sizes=[(8, 8)], message_format="role")[0] == "User: What is it?<|image|> Assistant:"
    assert messages(QA, image_last=True)[0] == "What is it?"


def test_messages_with_roles_and_braces():
    chat = {"messages": [{"role": "user", "content": "{a}"}, {"role": "assistant", "content": "{}"}]}
    assert messages(chat, message_format="qwen3") == ["<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n", "{}"]


@pytest.mark.parametrize(
    ("style", "system_prompt", "expected"),
    [
        ("vqa2", "style", "vqa2: What is it?"),
        ("vqa2", "no_style", "What is it?"),
        ("vqa2", None, "What is it?"),
        ("android_control", "demo_or_style", "What is it?"),
        ("demo", "demo_or_style_v2", "What is it?"),
        ("a_okvqa_mc", "demo_or_style_v2", "What is it?"),
        ("video_multiple_choice", "demo_or_style_v2", "What is it?"),
        ("user_qa", "demo_or_style_v2", "What is it?"),
        ("video_point_count", "demo_or_style_v2", "What is it?"),
        ("vqa2", "demo_or_style_v2", "vqa2: What is it?"),
        ("figure_qa_mc", "demo_or_style_v2", "figure_qa_mc: What is it?"),
        ("eval_short_answer", "style", "vqa2: What is it?"),
        ("video_eval_short_answer", "demo_or_style", "llava_video_da: What is it?"),
        ("video_eval_short_answer", "demo_or_style_v2", "video_short_answer: What is it?"),
        ("eval_multi_image_mc", "demo_or_style", "eval_multi_image_mc: What is it?"),
        ("eval_multi_image_qa", "demo_or_style_v2", "multi_image_qa: What is it?"),
    ],
)
def test_style_prefixes(style, system_prompt, expected):
    assert messages(QA | {"style": style}, system_prompt=system_prompt)[0] == expected


def test_demo_styles_have_a_prefix_one_time_in_ten():
    prompts = [messages(QA | {"style": "user_qa"}, seed, system_prompt="demo_or_style")[0] for seed in range(600)]
    assert 30 < sum(prompt == "user_qa: What is it?" for prompt in prompts) < 95
    assert set(prompts) == {"user_qa: What is it?", "What is it?"}


def test_length_prefixes():
    caption = {"style": "long_caption", "text": "x" * 300}
    lengths = set()
    for seed in range(200):
        prompt = messages(caption, seed, system_prompt="style_and_length")[0]
        lengths.add(int(prompt.split()[1].rstrip(":")) if prompt != "long_caption :" else None)
    assert None in lengths
    numbers = lengths - {None}
    assert len(numbers) > 5
    assert all(12 <= n <= 28 for n in numbers)
    assert {messages(caption, s, system_prompt="style_and_length_v3")[0] for s in range(50)} <= {f"long_caption {n}:" for n in range(9, 16)}
    ask = {"style": "long_caption"}
    assert messages(ask, for_inference=True, system_prompt="style_and_length_v2") == ["long_caption 65:"]
    assert messages(ask, for_inference=True, system_prompt="style_and_length_v2", default_inference_len=None) == ["long_caption:"]
    pointing = {"style": "pointing", "label": "dogs"}
    assert messages(pointing, for_inference=True, system_prompt="style_and_length_v2", pointing_format="html-v1") == ["pointing: dogs"]


def test_answers():
    votes = {"style": "vqa2", "question": "?", "answers": ["b", "a", "b", "a", "c"]}
    assert {messages(votes, seed)[1] for seed in range(40)} == {" a", " b"}
    assert {messages(votes, seed, select_answer="first")[1] for seed in range(5)} == {" a"}
    assert messages(QA | {"answer": 3})[1] == " 3"
    assert messages(QA | {"explanation": "It purrs."})[1] == " It purrs. Answer: a cat"
    assert messages(QA, for_inference=True) == ["What is it?"]
    assert messages({"style": "vqa2", "question": "?"}, for_inference=True) == ["?"]


def test_nulls_of_tables_are_absent_keys():
    row = QA | {"options": None, "points": None, "messages": None, "message_list": None, "label": None, "weight": None}
    assert messages(row) == ["What is it?", " a cat"]


def test_multiple_choice():
    record = {"style": "a_okvqa_mc", "question": "Which?", "options": ["x", "y"], "answer_idx": 1}
    assert messages(record) == ["Which?\nA: x\nB: y\n", " B"]
    assert messages(record | {"option_names": ["1", "2"]}) == ["Which?\n1: x\n2: y\n", " 2"]
    v2 = {"prompt_templates": "uber_model_v2", "is_training": False}
    assert messages(record, **v2) == ["Which?\nOnly return the correct answer option.\nA. x\nB. y", " B. y"]
    assert messages(record, p_choice_content_in_mc=0.0, **v2)[1] == " B"
    assert messages(record, for_inference=True, **v2) == ["Which?\nOnly return the correct answer option.\nA. x\nB. y"]
    unlabelled = {"style": "vqa2", "question": "Which?", "unlabelled_options": ["x", "y"], "answer_idx": 0}
    assert messages(unlabelled) == ["Which?\nx\ny\n", " x"]


def test_templates():
    uber = {"prompt_templates": "uber_model"}
    assert len({messages({"style": "long_caption", "text": "t"}, s, **uber)[0] for s in range(60)}) > 8
    assert messages({"style": "long_caption", "text": "t"}, is_training=False, **uber) == ["Describe this image.", " t"]
    assert messages({"style": "pixmo_transcript", "text": "t"}, is_training=False, **uber)[0].startswith("Talk about this image")
    assert messages(QA, **uber) == ["What is it?", " a cat"]
    reasoned = {messages(QA | {"explanation": "e"}, s, **uber)[0] for s in range(40)}
    assert len(reasoned) > 3
    assert all("What is it?" in prompt for prompt in reasoned)
    how_many = {"style": "user_qa", "question": "How many cups?", "answer": "Three."}
    assert messages(how_many, **uber)[0] != "How many cups?"
    assert messages(how_many, is_training=False, **uber)[0] == "How many cups?"


def test_pointing():
    record = {"style": "pointing", "label": "Red Mat", "points": [[12.0, 40.0]]}
    tag = '<point x="15.0" y="66.7" alt="red mat">red mat</point>'
    assert messages(record, image_sizes=[(80, 60)]) == ["red mat", " " + tag]
    assert messages(record | {"question": "Point to it."}, image_sizes=[(80, 60)]) == ["Point to it.", " " + tag]
    assert messages(record, image_sizes=[(80, 60)], pointing_format="html-v2")[1] == ' <points coords="1 1 150 667">red mat</points>'
    counted = messages(record | {"style": "count_then_point", "point_scale": 100})[1]
    assert counted == ' There are 1 <point x="12.0" y="40.0" alt="red mat">red mat</point>.'
    assert messages({"style": "pointing", "label": "mat"}, for_inference=True, prompt_templates="uber_model") == ["Point to mat"]


def test_answers_that_point():
    record = {
        "style": "point_qa", "question": "Where?", "answer": "Here <|POINT|> and there <|POINT|>.", "point_scale": 100,
        "answer_annotations": [{"points": [[1, 2]], "label": "one"}, {"points": [[3, 4]], "label": "two", "alt": "second"}],
    }  # fmt: skip
    first, second = '<point x="1.0" y="2.0" alt="one">one</point>', '<point x="3.0" y="4.0" alt="second">two</point>'
    assert messages(record)[1] == f" Here {first} and there {second}."


def test_points_in_several_images():
    record = {"style": "pointing", "label": "dogs", "image_points": [[[10, 10]], [], [[20, 20]]], "point_scale": 100}
    v2 = {"prompt_templates": "uber_model_v2", "pointing_format": "html-v2"}
    prompt, answer = messages(record, p_multi_point_all_image=1.0, **v2)
    assert "dogs" in prompt
    assert answer == ' <points coords="1 1 100 100;3 2 200 200">dogs</points>'
    asked = {}
    for seed in range(60):
        prompt, answer = messages(record, seed, p_multi_point_all_image=0.0, **v2)
        asked[next(c for c in prompt if c.isdigit())] = answer
    assert asked == {
        "1": ' <points coords="1 1 100 100">dogs</points>',
        "2": " There are none.",
        "3": ' <points coords="3 1 200 200">dogs</points>',
    }


def test_points_in_a_video_and_tracks():
    v2 = {"pointing_format": "html-v2"}
    record = {"style": "pointing", "label": "dogs", "timestamps": [0.5, 1.0], "points": [[[10, 10]], [[20, 20]]], "point_scale": 100}
    assert messages(record, **v2) == ["dogs", ' <points coords="0.5 1 100 100;1.0 2 200 200">dogs</points>']
    tracks = {"style": "tracking", "label": "dogs", "timestamps": [0, 0.5], "tracks": [{"a": [8, 6]}, {"a": None, "b": [40, 30]}]}
    assert messages(tracks, image_sizes=[(80, 60)], **v2)[1] == ' <tracks coords="0.0 1 100 100;0.5 2 500 500">dogs</tracks>'
    with pytest.raises(ValueError, match="html-v1 or html-v2"):
        messages(record)


def test_the_track_of_a_given_point():
    """The question gives the first point that is seen (sometimes another while training), as text; the answer is what comes after it."""
    v2 = {"prompt_templates": "uber_model_v2", "pointing_format": "html-v2"}
    seen = [None, [10, 10], None, [20, 30], [30, 30]]
    record = {"style": "video_single_point_track_per_frame", "label": "Ball", "timestamps": [0, 0.5, 1, 1.5, 2], "point_scale": 100}
    record["tracks"] = [{"a": xy} for xy in seen]
    prompt, answer = messages(record, **v2, is_training=False)
    assert '<points coords="0.5 1 100 100">ball</points>' in prompt
    assert answer == ' <tracks coords="1.5 1 200 300;2.0 1 300 300">ball</tracks>'
    given = [messages(record, seed, **v2, is_training=True) for seed in range(200)]
    first = sum('coords="0.5 1' in prompt for prompt, _ in given)
    assert 200 * 0.8 < first < 200  # a fifth of the times any of the three
    assert any(answer == " No tracks available." for _, answer in given), "nothing comes after the last"
    with pytest.raises(ValueError, match=r"of one object; these are of 2 \(a, b\)"):
        messages(record | {"tracks": [{"a": xy, "b": xy} for xy in seen]}, **v2)
    with pytest.raises(ValueError, match="'a' is never seen"):
        messages(record | {"tracks": [{"a": None}] * 5}, **v2)


def test_weights():
    formatter = Formatter(DataFormatter())
    rng = np.random.RandomState(0)
    assert formatter(QA, rng)[0].weight == MessageWeight()
    assert formatter(QA | {"weight": 0.5}, rng)[0].weight == MessageWeight(0.5)
    pointing = {"weight": 0.2, "root_subsegments": False, "root_length": False}
    tree = {"weight": 0.5, "message_list": [QA | {"message_weight": pointing, "weight": 2.0}]}
    assert formatter(tree, rng)[0].weight == MessageWeight(0.2, root_subsegments=False, root_length=False)
    assert formatter({"message_weight": {"weight": 0.1}, "message_list": [QA]}, rng)[0].weight == MessageWeight(0.1)
    with pytest.raises(ValueError, match="got \\['scale'\\]"):
        formatter(QA | {"message_weight": {"scale": 1}}, rng)


def test_a_tree_takes_the_style_of_its_example_and_is_shuffled():
    tree = {"style": "vqa2", "message_list": [{"question": str(i), "answer": "a"} for i in range(4)]}
    formatter = Formatter(DataFormatter(system_prompt="style", message_format="none"))
    orders = {tuple(a.messages[0] for a in formatter(tree, np.random.RandomState(seed))) for seed in range(100)}
    assert len(orders) > 15
    assert {frozenset(o) for o in orders} == {frozenset(f"vqa2: {i}" for i in range(4))}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"style": "vqa2"}, "no task in a record with the keys"),
        ({"style": "vqa2", "question": "?"}, "needs an answer"),
        ({"style": "vqa2", "question": 3, "answer": "x"}, "question must be a string"),
        ({"style": "vqa2", "question": "?", "answers": []}, "empty list"),
        ({"style": "pointing", "points": [[1, 1]], "point_scale": 100}, "needs a label or a question"),
        ({"style": "pointing", "label": "x", "points": [[1, 1]]}, "need an image"),
        ({"question": "?", "options": ["a"], "answer_idx": 1}, "answer_idx=1 is none of the 1 options"),
        ({"question": "?", "options": ["a", "b"], "answer_idx": 1, "option_names": ["A"]}, "2 options, but only 1 option_names"),
        ({"question": "?", "answer": "<|POINT|>", "answer_annotations": []}, "1 <|POINT|> slots"),
        ({"message_list": []}, "message_list is empty"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "must be 'user'"),
        ({"messages": ["a", {"role": "user", "content": "x"}]}, "must be 'assistant'"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages\\[0\\] is list"),
    ],
)
def test_errors_name_what_is_wrong(record, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|").replace("<\\|POINT\\|>", r"<\|POINT\|>")):
        messages(record)
