"""Autoregressive generation: one pass over the prompt with all visual inputs, then one token at a time from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from molmo_core.generation.beam_search import BeamSearch
from molmo_core.generation.sampling import SamplingConfig, next_token, seeded
from molmo_core.inputs import as_batch, default_positions, last_positions
from molmo_core.nn.kv_cache import KVCache
from molmo_core.outputs import OLMoGenerateOutput
from molmo_core.preprocessing.point_reader import read_points

PAD_TOKEN_ID = -1
# Keys of a batch that only training uses; `model.generate(**batch)` may carry them.
TRAINING_KEYS = ("labels", "loss_masks", "metadata")


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    images: torch.Tensor | None = None,
    max_new_tokens: int = 200,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    num_beams: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    **inputs: Any,
) -> OLMoGenerateOutput:
    """Continues every prompt of a batch.

    Args:
        model: a model in eval mode; `model.tokenizer` gives the end token and the text.
        input_ids: [B, S] prompts, padded on the right with -1; or one example [S], as a preprocessor gives it.
        images, inputs: the other inputs of `model.forward` by name. What only training uses (labels, loss masks) is ignored; `metadata`
            (of one example, or a list) tells where the points of a MolmoPoint are, for the text.
        max_new_tokens: tokens a row gets at most.
        min_new_tokens: no end token before that many.
        do_sample: draw tokens (temperature, top_p, top_k) instead of taking the most probable one; the first one, too.
        num_beams: more than 1: beam search by cumulative log-probability.
        eos_token_id: token or tokens that end a row; default: the tokenizer's end token.
        pad_token_id: fills `token_ids` after the end; default -1.
        seed: makes sampling reproducible (None: torch's global generator).

    Raises:
        ValueError: settings that contradict each other, or an empty prompt.
    """
    sampling = SamplingConfig(do_sample, temperature, top_p, top_k)
    if num_beams < 1 or (num_beams > 1 and not sampling.greedy):
        raise ValueError(f"num_beams={num_beams}: beam search needs at least 1 beam and do_sample=False")
    metadata = inputs.get("metadata")
    batch = prompt_batch(model, {"input_ids": input_ids, "images": images, **inputs})
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens}, max_new_tokens={max_new_tokens}: need 0 <= min <= max and max >= 1")
    pad = PAD_TOKEN_ID if pad_token_id is None else pad_token_id
    ends = _Ends(_end_tokens(model, eos_token_id, batch["input_ids"].device), pad, min_new_tokens, max_new_tokens)
    decoder = Decoder(model, max_new_tokens)
    if num_beams > 1:
        search = _search(decoder, batch, BeamSearch(num_beams, ends.tokens, pad), ends)
        first = torch.arange(len(search.tokens)) * num_beams
        texts = _texts(model, search.tokens[:, 0], ends, decoder.places(first), metadata)
        return OLMoGenerateOutput(search.tokens[:, 0], texts, search.scores[:, 0], search.tokens, search.scores, decoder.internal)
    tokens, scores = _sample(decoder, batch, sampling, ends, seed)
    texts = _texts(model, tokens, ends, decoder.places(torch.arange(len(tokens))), metadata)
    return OLMoGenerateOutput(tokens, texts, scores, internal=decoder.internal)


def prompt_batch(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch on the model's device: arrays become tensors, one example [S] a batch of one, training keys are left out.

    Raises:
        ValueError: a row without a token, or packed examples.
    """
    tensors = as_batch({k: v for k, v in inputs.items() if v is not None and k not in TRAINING_KEYS}, model.device)
    if "subsegment_ids" in tensors:
        raise ValueError("generate: subsegment_ids mark message trees and packed examples; a prompt is one conversation a row")
    mask = tensors.setdefault("attention_mask", tensors["input_ids"] != PAD_TOKEN_ID).bool()
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"generate: no valid token in row(s) {empty} of input_ids")
    return tensors


class Decoder:
    """The model with its cache: next-token logits for a prompt, then for one token at a time."""

    def __init__(self, model: Any, max_new_tokens: int) -> None:
        self._model = model
        self._new = max_new_tokens
        self._found: dict[str, torch.Tensor] | None = None

    @property
    def internal(self) -> dict[str, torch.Tensor] | None:
        """What the model found out besides tokens."""
        state = self._cache.state
        return self._found if state is None else {**(self._found or {}), **state.internal()}

    def places(self, rows: torch.Tensor) -> list[list[int]]:
        """What each token of these rows that was fed back stands for, -1: text; of models without points nothing."""
        found = (self.internal or {}).get("point_places")
        return [[] for _ in rows] if found is None else found[rows.to(found.device)].tolist()

    def prefill(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits [B, E] float32 after the last valid token of every prompt."""
        mask = batch["attention_mask"].bool()
        rows, length = mask.shape
        positions = batch.get("position_ids")
        positions = default_positions(mask) if positions is None else positions
        self._next_position = positions.gather(1, last_positions(mask).unsqueeze(1)) + 1
        # The mask has room for all new tokens; a step sees the part that exists by then.
        self._mask = torch.cat([mask, mask.new_ones(rows, self._new)], dim=1)
        self._length = length
        self._cache = KVCache(length + self._new)
        inputs = {**batch, "attention_mask": mask, "position_ids": positions}
        output = self._model(**inputs, past_key_values=self._cache, use_cache=True, last_logits_only=True)
        self._found = output.internal
        return output.logits[:, -1].float()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, E] float32 after one more token a row, `tokens` [B]."""
        self._length += 1
        output = self._model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self._mask[:, : self._length],
            position_ids=self._next_position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._next_position = self._next_position + 1
        return output.logits[:, -1].float()

    def extend(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, E] float32 after more of the prompt: int64 [B, L], padded on the right with -1, and its positions.

        A prompt can be read in parts: first what several have in common, then (after `reorder`) what follows in each. Media must
        stand in the first part.
        """
        valid = input_ids != PAD_TOKEN_ID
        if self._cache.state is not None:
            self._cache.state.begin()
        self._mask = torch.cat([self._mask[:, : self._length], valid, self._mask[:, self._length :]], dim=1)
        self._length += valid.shape[1]
        output = self._model(
            input_ids=input_ids,
            attention_mask=self._mask[:, : self._length],
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            last_logits_only=True,
        )
        self._next_position = position_ids.masked_fill(~valid, -1).amax(1, keepdim=True) + 1
        return output.logits[:, -1].float()

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i continues from what row `rows[i]` was; rows may repeat."""
        self._cache.reorder(rows)
        self._mask = self._mask[rows]
        self._next_position = self._next_position[rows]

    def all_done(self, finished: torch.Tensor) -> bool:
        """Whether every row ended; under FSDP, every row of every rank, since all ranks must run the same steps."""
        if isinstance(self._model, FSDPModule) and dist.is_initialized():
            flag = finished.all().int()
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            return bool(flag)
        return bool(finished.all())


class _Ends(NamedTuple):
    """When rows end."""

    tokens: torch.Tensor
    """int64 [n], each ends a row."""
    pad: int
    """Written after the end."""
    least: int
    most: int
    """New tokens of a row."""

    def allowed(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """Logits or log-probabilities [B, E] of the token after `count` new ones; -inf where it would end the row too early."""
        return scores if count >= self.least else scores.index_fill(1, self.tokens, -torch.inf)


def _sample(
    decoder: Decoder, batch: dict[str, Any], sampling: SamplingConfig, ends: _Ends, seed: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens int64 [B, T], padded after the end of a row, and the log-probability float32 [B] of each row under the model."""
    device = ends.tokens.device
    generator = None if seed is None else seeded(device, seed)
    logits = decoder.prefill(batch)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=device)
    columns, scores = [], torch.zeros(len(logits), device=device)
    for count in range(ends.most):
        tokens = next_token(ends.allowed(logits, count), sampling, generator)
        scores += logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1).masked_fill(finished, 0)
        columns.append(tokens.masked_fill(finished, ends.pad))
        finished = finished | torch.isin(tokens, ends.tokens)
        if count + 1 == ends.most or decoder.all_done(finished):
            break
        logits = decoder.step(tokens)
    return torch.stack(columns, dim=1), scores


def _search(decoder: Decoder, batch: dict[str, Any], search: BeamSearch, ends: _Ends) -> BeamSearch:
    log_probs = decoder.prefill(batch).log_softmax(-1)
    rows, device = len(log_probs), log_probs.device
    search.start(ends.allowed(log_probs, 0))
    decoder.reorder(torch.arange(rows, device=device).repeat_interleave(search.num_beams))
    offsets = torch.arange(rows, device=device).unsqueeze(1) * search.num_beams
    for count in range(1, ends.most):
        if decoder.all_done(search.finished):
            break
        log_probs = decoder.step(search.tokens[:, :, -1].flatten().clamp(min=0)).log_softmax(-1)
        parents = search.step(ends.allowed(log_probs, count).view(rows, search.num_beams, -1))
        decoder.reorder((offsets + parents).flatten())
    return search


def _end_tokens(model: Any, eos_token_id: int | Sequence[int] | None, device: torch.device) -> torch.Tensor:
    if eos_token_id is None:
        eos_token_id = model.tokenizer.eos_token_id
    return torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), dtype=torch.int64, device=device)


def answer_text(model: Any, tokens: Sequence[int], places: Sequence[int] = (), metadata: Mapping[str, Any] | None = None) -> str:
    """The text of an answer.

    Args:
        model: that gave it.
        tokens: without the end token.
        places: what those that are points stand for (see `Decoder.places`).
        metadata: what the preprocessor says of the prompt: points are written with coordinates if it is known where they are.
    """
    reader = model.config.answer_reader(model.tokenizer, metadata or {})
    return model.tokenizer.decode(tokens if reader is None else read_points(reader, tokens, places))


def _texts(model: Any, tokens: torch.Tensor, ends: _Ends, places: list[list[int]], metadata: Any) -> list[str]:
    end_tokens = set(ends.tokens.tolist())
    texts = []
    about = metadata if isinstance(metadata, list) else [metadata] * len(tokens)
    for row, chosen, known in zip(tokens.tolist(), places, about, strict=True):
        end = next((i for i, token in enumerate(row) if token in end_tokens), len(row))
        texts.append(answer_text(model, row[:end], chosen, known))
    return texts
