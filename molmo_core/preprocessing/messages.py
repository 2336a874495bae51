"""From messages to one training sequence: token ids, targets, loss weights, positions, and the segments of a message tree.

A message tree is one set of media with several independent conversations (annotations). The media stand once, at the front; every
annotation's positions restart after them, and `subsegment_ids` keep the annotations from seeing one another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo_core.preprocessing.configs import LossTokenWeighting
from molmo_core.preprocessing.point_tokens import MARKS
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.tokens import IMAGE_PROMPT, SHARED_SEGMENT, VIDEO_PROMPT

_MARK = re.compile(f"([{MARKS}])")
_PLACEHOLDER = re.compile(f"({re.escape(IMAGE_PROMPT)}|{re.escape(VIDEO_PROMPT)})")


@dataclasses.dataclass(frozen=True)
class MessageWeight:
    """How much an annotation counts in the loss, and which of the model's weighting rules apply to it (None = as configured)."""

    weight: float = 1.0
    root_subsegments: bool | None = None
    root_length: bool | None = None


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One conversation as it will be tokenised: texts that alternate user, assistant, roles and spaces included."""

    messages: Sequence[str]
    weight: MessageWeight = MessageWeight()
    turn_weights: Sequence[float] | None = None
    """For each message a factor of its loss; only the answers' are used. None = 1 each."""
    points: np.ndarray | None = None
    """int64 [n, 3]: what the points in the answers stand for, which are `point_tokens.MARKS` in the texts (MolmoPoint)."""


@dataclasses.dataclass(frozen=True)
class MediaTokens:
    """The tokens that stand for one image or video.

    Attributes:
        ids: int64 [n]; they never carry loss.
        positions: int64 [n] relative to the first, if not 0..n-1; what follows continues after the largest.
    """

    ids: np.ndarray
    positions: np.ndarray | None = None

    @property
    def extent(self) -> int:
        """Rotary positions that the tokens take up."""
        return int(self.positions.max()) + 1 if self.positions is not None and len(self.positions) else len(self.ids)


@dataclasses.dataclass
class _Tokens:
    """Token ids and loss weights of one annotation (0, or the turn's); `slots` are the offsets of media placeholders."""

    ids: list[int]
    weights: list[float]
    slots: list[int]
    points: np.ndarray | None = None

    @property
    def first_loss(self) -> int:
        """The first token that is trained on; without one, the end."""
        return next((i for i, weight in enumerate(self.weights) if weight > 0), len(self.ids) - 1)


def assemble_sequence(
    tokenizer: Tokenizer,
    annotations: Sequence[Annotation],
    media: Sequence[MediaTokens] = (),
    *,
    for_inference: bool = False,
    weighting: LossTokenWeighting | None = None,
    max_seq_len: int | None = None,
    max_text_tokens: int | None = None,
) -> dict[str, Any]:
    """Builds the sequence of one example.

    The order is begin token, media, text; where the first annotation holds `<|image|>` or `<|video|>` placeholders, the media stand
    there instead. In training the inputs are all tokens but the last and the labels all but the first; each annotation ends with an
    end-of-text target. At inference there are no labels, and a final assistant message is one to be continued.

    Args:
        annotations: one, or several for a message tree (training only).
        media: tokens of each image or video, in order.
        weighting: `root_subsegments` multiplies by sqrt(1/annotations); `root_subsegments_root_tokens` also by 2/sqrt(answer tokens).
        max_seq_len: longest sequence. In training, later annotations that would not reach their answer within it are left out and the
            last one is cut; both are counted in the result.
        max_text_tokens: the same for the text alone.

    Returns:
        `input_ids`, `position_ids` int64 [S]; in training also `labels` int64 [S] and `loss_masks` float32 [S]; for a tree
        `subsegment_ids` int64 [S]; with points `point_target_ids` int64 [n, 3] (see `point_places`), a row for each first token of a
        point in the inputs; `truncation` {"dropped_annotations", "dropped_tokens"} if anything was left out.

    Raises:
        ValueError: no answer to learn, placeholders that do not fit the media, or a first answer beyond the limits.
    """
    if not annotations:
        raise ValueError("an example needs at least one message")
    tree = len(annotations) > 1
    if tree and for_inference:
        raise ValueError(f"an example for inference holds one conversation, got a message tree of {len(annotations)}: ask them one by one")
    texts = [_tokenize(tokenizer, a, for_inference) for a in annotations]
    if not texts[0].slots:
        texts[0].slots = [0] * len(media)
    elif tree:
        raise ValueError(f"media inside the text ({IMAGE_PROMPT}) cannot be combined with a message tree: give one conversation")
    for text in texts[1:]:
        if text.slots:
            raise ValueError(f"a message tree shares its media: {IMAGE_PROMPT} may not stand in a later conversation")
    if len(texts[0].slots) != len(media):
        raise ValueError(f"the messages hold {len(texts[0].slots)} media placeholders, but the example has {len(media)} images or videos")

    media_length = 1 + sum(len(m.ids) for m in media)  # the begin token included
    if for_inference:
        return _inference_sequence(tokenizer, texts[0], media, media_length, max_seq_len)
    kept = _fitting(texts, media_length, max_seq_len, max_text_tokens)
    factors = _factors([a.weight for a in annotations[:kept]], texts[:kept], weighting)
    sequence = _training_sequence(tokenizer, texts[:kept], factors, media)
    length = len(sequence["input_ids"])
    limit = length if max_seq_len is None else min(length, max_seq_len)
    limit = limit if max_text_tokens is None else min(limit, media_length + max_text_tokens)
    if limit < media_length + max(texts[0].slots, default=0):
        raise ValueError(
            f"an image in a later turn is beyond the limit of {limit} tokens: raise max_seq_len, or give fewer images or shorter turns"
        )
    if limit < length:
        sequence = {k: v[:limit] for k, v in sequence.items()}
    if limit < length or kept < len(texts):
        sequence["truncation"] = {"dropped_annotations": len(texts) - kept, "dropped_tokens": length - limit}
    points = [text.points for text in texts[:kept] if text.points is not None]
    if points:
        sequence["point_target_ids"] = _points_within(np.concatenate(points), sequence["input_ids"], tokenizer)
    return sequence


def _tokenize(tokenizer: Tokenizer, annotation: Annotation, for_inference: bool) -> _Tokens:
    """Tokens of one conversation; every assistant message but one to be continued ends with the end-of-text token."""
    messages, turn_weights = annotation.messages, annotation.turn_weights
    result = _Tokens([], [], [], annotation.points)
    last = len(messages) - 1
    if not for_inference and len(messages) % 2:
        raise ValueError(f"a training conversation ends with an answer, got {len(messages)} message(s); the last is {messages[-1]!r}")
    for i, message in enumerate(messages):
        answer = i % 2 == 1
        weight = float(answer) if turn_weights is None else answer * float(turn_weights[i])
        parts = _PLACEHOLDER.split(message) if "<|" in message else [message]
        if answer and len(parts) > 1:
            raise ValueError(f"an answer may not hold a media placeholder: {message!r}")
        for j, part in enumerate(parts):
            if j % 2:
                result.slots.append(len(result.ids))
                continue
            ids = tokenizer.encode(part) if annotation.points is None else _with_point_tokens(tokenizer, part)
            result.ids += ids
            result.weights += [weight] * len(ids)
        if answer and not (for_inference and i == last):
            result.ids.append(tokenizer.eos_token_id)
            result.weights.append(weight)
    return result


def _with_point_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which `MARKS` are tokens of points."""
    ids: list[int] = []
    for part in _MARK.split(text):
        ids += [tokenizer.point_token_ids[MARKS.index(part)]] if part and part in MARKS else tokenizer.encode(part) if part else []
    return ids


def _points_within(points: np.ndarray, input_ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The rows of points whose tokens are in a sequence that may have been cut; a point that was cut has -1 where tokens are missing."""
    counts = [int((input_ids == token).sum()) for token in tokenizer.point_token_ids]
    points = points[: counts[0]].copy()
    for column in (1, 2):
        given = np.flatnonzero(points[:, column] >= 0)
        points[given[counts[column] :], column] = -1
    return points


def _fitting(texts: Sequence[_Tokens], media_length: int, max_seq_len: int | None, max_text_tokens: int | None) -> int:
    """How many annotations reach their answer within the limits. The token that carries loss at index p is predicted from p - 1."""
    start = 0
    for k, text in enumerate(texts):
        first = start + text.first_loss
        beyond = None
        if max_seq_len is not None and media_length + first > max_seq_len:
            beyond = f"max_seq_len={max_seq_len}"
        elif max_text_tokens is not None and first > max_text_tokens:
            beyond = f"max_text_tokens={max_text_tokens}"
        if beyond and k == 0:
            raise ValueError(
                f"the first answer would begin after {media_length - 1} media tokens and {first} text tokens, beyond {beyond}: "
                "raise the limit, or lower max_crops, max_images or max_frames"
            )
        if beyond:
            return k
        start += len(text.ids) - (k < len(texts) - 1)  # only the last one keeps its end token
    return len(texts)


def _factors(weights: Sequence[MessageWeight], texts: Sequence[_Tokens], weighting: LossTokenWeighting | None) -> list[float]:
    """Loss weight of the answer tokens of each annotation."""
    result = []
    for weight, text in zip(weights, texts):
        factor = weight.weight
        by_segments = weighting is not None if weight.root_subsegments is None else weight.root_subsegments
        by_length = weighting == "root_subsegments_root_tokens" if weight.root_length is None else weight.root_length
        if by_segments:
            factor *= len(texts) ** -0.5
        if by_length:  # as published, a tree's annotations are counted without their end tokens
            answer_tokens = sum(w > 0 for w in text.weights) - (len(texts) > 1)
            factor *= 2.0 * max(answer_tokens, 1.0) ** -0.5
        result.append(factor)
    return result


def _training_sequence(
    tokenizer: Tokenizer, texts: Sequence[_Tokens], factors: Sequence[float], media: Sequence[MediaTokens]
) -> dict[str, Any]:
    ids, positions, weights = _with_media(tokenizer, texts[0], media)
    if len(texts) == 1:
        return {
            "input_ids": ids[:-1],
            "labels": ids[1:],
            "loss_masks": weights[1:] * np.float32(factors[0]),
            "position_ids": positions[:-1],
        }
    # As an input an annotation stops before its end token, which is the label of its last token.
    inputs: list[int] = []
    labels: list[int] = []
    losses: list[float] = []
    for text in texts[1:]:
        inputs += text.ids[:-1]
        labels += text.ids[1:]
        losses += text.weights[1:]
    lengths = [len(ids) - 1, *(len(text.ids) - 1 for text in texts[1:])]
    starts = np.repeat(np.cumsum([0, *lengths[1:-1]]), lengths[1:])
    restart = 1 + sum(m.extent for m in media)
    segments = np.repeat(np.arange(len(texts)), lengths)
    segments[: 1 + sum(len(m.ids) for m in media)] = SHARED_SEGMENT
    return {
        "input_ids": np.concatenate([ids[:-1], np.array(inputs, np.int64)]),
        "labels": np.concatenate([ids[1:], np.array(labels, np.int64)]),
        "loss_masks": np.concatenate([weights[1:], np.array(losses, np.float32)]) * np.repeat(np.array(factors, np.float32), lengths),
        "position_ids": np.concatenate([positions[:-1], restart + np.arange(len(starts)) - starts]),
        "subsegment_ids": segments,
    }


def _inference_sequence(
    tokenizer: Tokenizer, text: _Tokens, media: Sequence[MediaTokens], media_length: int, max_seq_len: int | None
) -> dict[str, np.ndarray]:
    length = media_length + len(text.ids)
    if max_seq_len is not None and length > max_seq_len:
        raise ValueError(
            f"the prompt is {length} tokens long ({media_length - 1} of images or video, {len(text.ids)} of text), "
            f"more than max_seq_len={max_seq_len}: shorten the text, or use fewer or smaller images or frames"
        )
    ids, positions, _ = _with_media(tokenizer, text, media)
    points = {} if text.points is None else {"point_target_ids": text.points}
    return {"input_ids": ids, "position_ids": positions, **points}


def _with_media(tokenizer: Tokenizer, text: _Tokens, media: Sequence[MediaTokens]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begin token, media and one annotation: ids, positions, weights (0, or the turn's)."""
    tokens, loss = np.asarray(text.ids, np.int64), np.asarray(text.weights, np.float32)
    ids, weights = [np.array([tokenizer.bos_token_id])], [np.zeros(1, np.float32)]
    positions, at, done = [np.zeros(1, np.int64)], 1, 0
    for slot, item in zip([*text.slots, len(tokens)], [*media, None]):
        ids.append(tokens[done:slot])
        weights.append(loss[done:slot])
        positions.append(np.arange(at, at + slot - done))
        at += slot - done
        done = slot
        if item is not None:
            ids.append(item.ids)
            weights.append(np.zeros(len(item.ids), np.float32))
            positions.append(at + (np.arange(len(item.ids)) if item.positions is None else item.positions))
            at += item.extent
    return np.concatenate(ids, dtype=np.int64), np.concatenate(positions, dtype=np.int64), np.concatenate(weights, dtype=np.float32)
