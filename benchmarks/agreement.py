"""How often engines find the same token the most probable one behind the same tokens: all are fed with the answers of the first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from molmo_core.generation.engine.decoding import GraphDecoder
from molmo_core.generation.engine.engine import Engine
from molmo_core.generation.engine.requests import Request
from molmo_core.generation.engine.scheduler import Plan, Sequence

CLEAR = 3
"""A lead is clear if it is so many times as large as what another batch changes in leads (root mean square)."""


class Reading(NamedTuple):
    """What an engine found at each position of the answers, [answers, positions], on the CPU."""

    fed: torch.Tensor
    """int64: the tokens of the answers, those that prompts gave included: one more than positions."""
    best: torch.Tensor
    """int64: the most probable next token."""
    pair: torch.Tensor
    """int64 [..., 2]: the first reading's two most probable tokens."""
    lead: torch.Tensor
    """float32: by how much the first of the pair is ahead of the second, in this engine's logits."""


@torch.inference_mode()
def read(engine: Engine, requests: list[Request], positions: int, together: int, first: Reading | None = None) -> Reading:
    """Decodes answers of so many positions, so many together.

    Args:
        engine: idle; its limits allow so many answers.
        requests: the prompts; `max_tokens` is larger than `positions` by 2.
        positions: decoded for each.
        together: answers in a step.
        first: whose answers are fed; None: each token is the most probable one.
    """
    parts = []
    for start in range(0, len(requests), together):
        own = None if first is None else Reading(*(t[start : start + together] for t in first))
        parts.append(_read(engine, requests[start : start + together], positions, own))
    return Reading(*(torch.cat(tensors) for tensors in zip(*parts)))


def _read(engine: Engine, requests: list[Request], positions: int, first: Reading | None) -> Reading:
    for request in requests:
        engine.add(request)
    number = {request: i for i, request in enumerate(requests)}
    fed = torch.zeros(len(requests), positions + 1, dtype=torch.int64) if first is None else first.fed
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    while len(found) < positions:
        plan = engine.scheduler.plan()
        if plan.prefill:  # nobody is decoded before the last prompt is read
            best = engine.runner.prefill(plan.prefill).argmax(-1).cpu()
            engine.scheduler.done(Plan(plan.prefill, []))
            read = [(chunk.sequence, token) for chunk, token in zip(plan.prefill, best) if chunk.end == len(chunk.sequence.tokens)]
            for sequence, token in read:
                fed[number[sequence.request], 0] = token if first is None else fed[number[sequence.request], 0]
            _feed(engine, [sequence for sequence, _ in read], fed[[number[sequence.request] for sequence, _ in read], 0])
            continue
        order = torch.tensor([number[sequence.request] for sequence in plan.decode])
        assert sorted(order.tolist()) == list(range(len(requests))), "the cache has room for all"
        logits = engine.decoder.step(plan.decode).logits
        engine.scheduler.done(Plan([], plan.decode))
        pair = logits.topk(2).indices if first is None else first.pair[order, len(found)].to(logits.device)
        lead = logits.gather(1, pair)
        back = order.argsort()
        found.append((logits.argmax(-1).cpu()[back], pair.cpu()[back], (lead[:, 0] - lead[:, 1]).cpu()[back]))
        if first is None:
            fed[:, len(found)] = found[-1][0]
        _feed(engine, plan.decode, fed[order, len(found)])
    for request in requests:
        engine.abort(request)
    best, pairs, leads = (torch.stack(tensors, 1) for tensors in zip(*found))
    return Reading(fed, best, pairs, leads)


def _feed(engine: Engine, sequences: list[Sequence], tokens: torch.Tensor) -> None:
    for sequence, token in zip(sequences, tokens.tolist()):
        sequence.tokens.append(token)
    if sequences and isinstance(engine.decoder, GraphDecoder):
        engine.decoder.keep(sequences, tokens.to(engine.model.device))


def compared(first: Reading, again: Reading, others: dict[str, Reading]) -> dict[str, Any]:
    """Shares of positions with the same most probable token as `first`.

    Args:
        first: the answers that were fed.
        again: the same model, other numbers of answers together.
        others: by name.

    Returns:
        `clear`: the share of positions where the lead of the first over the second token is more than `CLEAR` times what `again` changes
        in leads (root mean square); and for `again` and each of the others `agreement`, `agreement_clear` at these positions, and what it
        changes in leads, `lead_change`.
    """
    clear = first.lead > CLEAR * _change(first, again)
    line: dict[str, Any] = {
        "positions": first.best.numel(), "median_lead": round(first.lead.median().item(), 4), "clear": round(clear.float().mean().item(), 4)
    }  # fmt: skip
    for name, other in {"again": again, **others}.items():
        same = (first.best == other.best).float()
        line[name] = {
            "agreement": round(same.mean().item(), 4),
            "agreement_clear": round(same[clear].mean().item(), 4) if clear.any() else None,
            "lead_change": round(_change(first, other), 4),
        }
    return line


def _change(first: Reading, other: Reading) -> float:
    return (other.lead - first.lead).square().mean().sqrt().item()
