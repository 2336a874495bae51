"""Greedy answers to many questions about each of many images, reading every image once.

Prompts about the same media begin alike: begin token, image tokens, the start of the text. That part is read once for all of them,
its keys and values are handed to every question, and rows leave as their answers end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from molmo_core.generation.generate import PAD_TOKEN_ID, Decoder, answer_text, prompt_batch

Example = dict[str, Any]
Collate = Callable[[list[Example]], dict[str, Any]]
COMPACT_AT = 0.5
"""Ended rows are dropped from the cache once at least this share of its rows has ended (each time copies the rest)."""


@torch.no_grad()  # not inference_mode: what a model keeps (tables, gathered weights) is trained with later
def answer(model: Any, groups: Sequence[Sequence[Example]], collate: Collate, max_new_tokens: int) -> list[list[str]]:
    """The model's answers.

    Args:
        model: in eval mode.
        groups: for each image (or other media) its preprocessed prompts, at least one.
        collate: the model's collator without a fixed length.
        max_new_tokens: an answer is cut there.

    Returns:
        the texts, ordered as the prompts; they equal those of `model.generate` for each prompt alone.
    """
    lengths = [shared_prefix(group, model.tokenizer.image_token_ids) for group in groups]
    # Media behind the question leave nothing to share, and image tokens that see the question cannot be read before it.
    if 0 in lengths or getattr(model.config, "bi_directional_attn", None) == "image_to_question":
        return _separately(model, groups, collate, max_new_tokens)
    prefixes = [_part(group[0], slice(0, length)) for group, length in zip(groups, lengths)]
    rows = [(i, example) for i, group in enumerate(groups) for example in group]
    ids, positions = _rests([(example, lengths[i]) for i, example in rows], model.device)
    decoder = Decoder(model, ids.shape[1] + max_new_tokens)
    decoder.prefill(prompt_batch(model, collate(prefixes)))
    decoder.reorder(torch.tensor([i for i, _ in rows], device=model.device))
    answers = _greedy(decoder, decoder.extend(ids, positions), model.tokenizer.eos_token_id, max_new_tokens)
    known = [example.get("metadata") for _, example in rows]
    texts = iter([answer_text(model, tokens, places, about) for (tokens, places), about in zip(answers, known)])
    return [[next(texts) for _ in group] for group in groups]


def shared_prefix(group: Sequence[Example], media_tokens: frozenset[int]) -> int:
    """Tokens at the start that all prompts have in common, at least one less than the shortest; 0 if media stand behind them."""
    length = min(len(example["input_ids"]) for example in group) - 1
    first = np.asarray(group[0]["input_ids"])
    for example in group[1:]:
        different = np.flatnonzero(np.asarray(example["input_ids"])[:length] != first[:length])
        length = int(different[0]) if len(different) else length
    return 0 if any(np.isin(example["input_ids"][length:], list(media_tokens)).any() for example in group) else length


def _part(example: Example, part: slice) -> Example:
    return {**example, "input_ids": example["input_ids"][part], "position_ids": example["position_ids"][part]}


def _rests(rows: Sequence[tuple[Example, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions [B, L] of what follows the shared part, padded on the right."""
    longest = max(len(example["input_ids"]) - length for example, length in rows)
    ids = torch.full((len(rows), longest), PAD_TOKEN_ID)
    positions = torch.zeros_like(ids)
    for i, (example, length) in enumerate(rows):
        size = len(example["input_ids"]) - length
        ids[i, :size] = torch.as_tensor(example["input_ids"][length:])
        positions[i, :size] = torch.as_tensor(example["position_ids"][length:])
    return ids.to(device), positions.to(device)


def _greedy(decoder: Decoder, logits: torch.Tensor, end: int, max_new_tokens: int) -> list[tuple[list[int], list[int]]]:
    """The most probable continuation of every row, without the end token, and what those of its tokens that are points stand for."""
    answers: list[list[int]] = [[] for _ in range(len(logits))]
    places: list[list[int]] = [[] for _ in range(len(logits))]
    rows = list(range(len(logits)))  # which answer each row of the cache belongs to
    going = [True] * len(rows)
    for count in range(max_new_tokens):
        tokens = logits.argmax(-1)
        for i, token in enumerate(tokens.tolist()):
            going[i] = going[i] and token != end
            if going[i]:
                answers[rows[i]].append(token)
        if not any(going) or count + 1 == max_new_tokens:
            break
        if sum(going) <= COMPACT_AT * len(going):
            kept = [i for i, goes in enumerate(going) if goes]
            index = torch.tensor(kept, device=tokens.device)
            decoder.reorder(index)
            tokens, rows, going = tokens[index], [rows[i] for i in kept], [True] * len(kept)
        logits = decoder.step(tokens)
        for i, chosen in enumerate(decoder.places(torch.arange(len(rows)))):
            places[rows[i]] = chosen
    return list(zip(answers, places))


def _separately(model: Any, groups: Sequence[Sequence[Example]], collate: Collate, limit: int) -> list[list[str]]:
    examples = [example for group in groups for example in group]
    known = [example.get("metadata") for example in examples]
    texts = iter(model.generate(**collate(examples), metadata=known, max_new_tokens=limit).text)
    return [[next(texts) for _ in group] for group in groups]
