"""Prompt templates: many ways to ask for the same thing, so that a model does not depend on one wording.

`{label}` is what to point at or count, `{question}` the question of a record, `{options}` its answer options (one a line).
Several sentences say where the answer goes, because a template may follow any question.
"""

from __future__ import annotations

import re

import numpy as np

CAPTION = "long_caption"

TEMPLATES: dict[str, tuple[str, ...]] = {
    "long_caption": (
        "Describe this image.",
        "Describe the image in detail.",
        "Give a thorough description of this picture.",
        "What does this image show? Be detailed.",
        "Write a long caption for this photo.",
        "Tell me everything you can see here.",
        "Please describe the picture so that someone who cannot see it can imagine it.",
        "Explain what is in the image, including small details.",
        "caption the image at length",
        "Write a paragraph about this picture.",
        "Walk me through the contents of this image.",
        "I need a complete description of what is shown.",
        "Provide a detailed account of the scene.",
        "what can be seen in this image? describe all of it",
    ),
    "short_caption": (
        "Caption this image in one sentence.",
        "Write a brief caption.",
        "What is this a picture of? Keep it short.",
        "Sum up the image in a few words.",
        "Give a one-line description of the picture.",
        "short caption please",
        "Describe the photo briefly.",
        "In a single sentence, what does the image show?",
    ),
    "transcript": (
        "Talk about this image as if you were speaking to a friend.",
        "Describe the image the way a person would say it out loud.",
        "Give a spoken-style description of this picture.",
        "Say what you notice in the image, in everyday speech.",
        "Pretend you are on the phone and describe this picture.",
        "Write down what somebody might say while looking at this image.",
    ),
    "video_long_caption": (
        "Describe this video in detail.",
        "What happens in this video? Tell me everything.",
        "Write a long caption for the clip.",
        "Give a thorough account of the video from beginning to end.",
        "Narrate what is shown in this video.",
        "Explain the events of the clip, with details of people, things and places.",
    ),
    "video_short_caption": (
        "Caption this video in one sentence.",
        "Sum up the clip briefly.",
        "What is this video about? Keep it short.",
        "Give a one-line description of the video.",
        "short video caption please",
    ),
    "pointing": (
        "Point to {label}",
        "Point at {label}",
        "Point to the {label}.",
        "Please point to every {label} in the image.",
        "Can you point out all {label}?",
        "Where are the {label}?",
        "Where can I find {label}?",
        "Show me where the {label} are.",
        "Locate {label}.",
        "Find {label} in this picture.",
        "Mark each {label} with a point.",
        "Give the coordinates of all {label}.",
        "point: {label}",
        "{label}: where?",
        "Is there any {label} here? Point to it.",
        "Look for {label} and point to what you find.",
    ),
    "point_count": (
        "How many {label} are there?",
        "Count the {label}.",
        "How many {label} are in the image?",
        "Tell me the number of {label} in the picture.",
        "Point to the {label} and say how many there are.",
        "Count every {label} by pointing at each.",
        "What is the total number of {label}?",
        "count {label}",
        "number of {label}?",
        "I would like to know how many {label} you can see.",
    ),
    "count_then_point": (
        "How many {label} are there? Give the number, then point to them.",
        "State the count of {label} and point to each afterwards.",
        "First tell me how many {label} there are, then where they are.",
        "Number of {label}, followed by their positions, please.",
    ),
    "count": (
        "How many {label} are there? Answer with a number only.",
        "Count the {label} and give just the number.",
        "Number of {label} in the picture, as digits.",
        "Without pointing, how many {label} do you see?",
    ),
    "pointing_multi_image": (
        "Point to {label} in all images.",
        "In every image, point to {label}.",
        "Find all {label} across the images.",
        "Mark {label} in each of these pictures.",
        "Look through all of the images and point at {label}.",
    ),
    "pointing_one_of_images": (
        "Point to {label} in image {image}.",
        "In image {image}, point to {label}.",
        "Where are the {label} in image {image}?",
        "Look only at image {image} and mark {label}.",
    ),
    "video_pointing": (
        "Point to {label} in the video.",
        "When and where do {label} appear? Point to them.",
        "Find {label} in this clip and point.",
        "Mark every appearance of {label} in the video.",
        "Give times and positions of {label}.",
    ),
    "tracking": (
        "Track {label}.",
        "Track {label} through the video.",
        "Follow {label} from frame to frame.",
        "Where do {label} move? Track them.",
        "Keep track of all {label} in this clip.",
    ),
    "tracking_a_point": (
        "Track {point}.",
        "Follow this point: {point}",
        "Where does {point} go from there?",
        "Track what is at {point} through the rest of the video.",
        "Starting at {point}, give its position in every later frame.",
    ),
    "explanation": (
        "{question} Explain your reasoning before you answer.",
        "{question} Think it through step by step, then give the answer.",
        "{question}\nFirst give a rationale, then the answer.",
        "{question} Justify the answer, and state it at the end.",
        "Give your reasoning first and the answer last: {question}",
        "{question} Say how you know, and finish with the answer.",
    ),
    "multiple_choice": (
        "{question}\nOnly return the correct answer option.\n{options}",
        "{question}\n{options}\nWhich option is correct?",
        "{question}\n{options}\nChoose one of the options.",
        "{question} Pick from these answers:\n{options}",
        "Select the right option for the question.\n{question}\n{options}",
        "{question}\n{options}\nReply with the right option only.",
        "{question}\n\nOptions:\n{options}",
        "Answer this multiple-choice question: {question}\n{options}",
    ),
    "no_pointing": (
        "Do not point. {question}",
        "Answer without pointing: {question}",
        "Without giving any points, answer this. {question}",
        "{question} Please do not point at anything.",
        "Only words and no points: {question}",
    ),
}  # fmt: skip

_HOW_MANY = re.compile(r"\bhow many\b", re.IGNORECASE)


def fill(kind: str, rng: np.random.RandomState, random: bool, **values: str) -> str:
    """A prompt of one kind: a random template while training, the first one otherwise.

    Args:
        kind: key of `TEMPLATES`.
        rng: draws the template.
        random: False = always the first template.
        values: `label`, `question`, `options`, `image` or `point`, as the template needs.
    """
    templates = TEMPLATES[kind]
    template = templates[rng.randint(len(templates))] if random else templates[0]
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


def without_pointing(question: str, rng: np.random.RandomState) -> str:
    """A "how many" question that asks for words: such questions otherwise teach the model to count without pointing."""
    return fill("no_pointing", rng, True, question=question) if _HOW_MANY.search(question) else question
