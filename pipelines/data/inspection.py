"""Examples as the model sees them, as one self-contained page: crops, pooled tokens, frame times, loss weights, segments, points, mask."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo_core.preprocessing.images import image_token_counts
from molmo_core.preprocessing.packing import unpack
from molmo_core.preprocessing.points import Point, extract_points
from molmo_core.preprocessing.tiling import ImageSettings, image_tiling
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.tokens import PACK_STRIDE, SHARED_SEGMENT

_POOLED = ("pooled_patches_idx", "low_res_pooled_idx", "high_res_pooled_idx", "low_res_tokens_idx", "high_res_tokens_idx")
_MASK_PIXELS = 700
_VIEW = 300  # width of a crop on the page, pixels


class Inspector:
    """Draws preprocessed examples.

    Args:
        tokenizer, settings: of the model.
        mask: from (input_ids, subsegment_ids or None, loss_masks) of one row to bool [S, S], True = may attend.
    """

    def __init__(self, tokenizer: Tokenizer, settings: ImageSettings, mask: Any):
        self.tokenizer, self.settings, self.mask = tokenizer, settings, mask

    def page(self, rows: Sequence[dict[str, Any]], title: str) -> str:
        """The page of some training rows (packs are taken apart; the mask is that of the first row)."""
        sections = [self.mask_section(rows[0])] if rows else []
        for number, row in enumerate(rows, 1):
            examples = unpack(row) if "packed" in (row.get("metadata") or {}) else [row]
            for k, example in enumerate(examples, 1):
                name = f"Row {number}" + (f", example {k} of {len(examples)}" if len(examples) > 1 else "")
                sections.append(self.example(example, name))
        template = Path(__file__).with_name("inspect.html").read_text(encoding="utf-8")
        return template.replace("{{title}}", html.escape(title)).replace("{{content}}", "\n".join(sections))

    def example(self, example: dict[str, Any], name: str) -> str:
        """One example: where it is from, its pictures, its tokens."""
        metadata = example.get("metadata") or {}
        weights = example.get("loss_masks", np.zeros(len(example["input_ids"])))
        segments = example.get("subsegment_ids")
        facts = [f"{len(example['input_ids']):,} tokens", f"{int((weights > 0).sum()):,} with loss (sum {weights.sum():.2f})"]
        if segments is not None:
            facts.append(f"{len(set(segments.tolist()) - {SHARED_SEGMENT}):,} annotations")
        if "images" in example:
            count, kind = len(example["images"]), "frame" if "frame_times" in metadata else "crop"
            facts.append(f"{count:,} {kind}{'' if count == 1 else 's'}")
        facts += [f"{k}: {v}" for k, v in metadata.items() if isinstance(v, str | int | float) or k == "image_sizes"]
        items = "".join(f"<li>{html.escape(str(fact))}</li>" for fact in facts)
        return f'<section class="example"><h2>{name}</h2><ul>{items}</ul>{self.pictures(example)}{self.tokens(example)}</section>'

    def pictures(self, example: dict[str, Any]) -> str:
        """Every crop with its pooled tokens; on whole images and frames the answers' points, on the first the outlines of the others."""
        if "images" not in example:
            return ""
        crops = [self._pixels(patches) for patches in example["images"]]
        pooled = self._pooled(example, example["images"].shape[1])
        metadata = example.get("metadata") or {}
        times = metadata.get("timestamps") or metadata.get("frame_times")
        points = self._points(example, times)
        shown = []
        for i, pixels in enumerate(crops):
            content = _content(example["image_masks"][i], self.settings.crop_grid) if "image_masks" in example else (0.0, 0.0, 1.0, 1.0)
            overlay = "".join(pooled[i])
            if i == 0:
                overlay += self._outlines(example, content)
            overlay += "".join(self._circle(point, content) for point in points.get(i, ()))
            caption = f"{times[i]:.2f} s" if times is not None and i < len(times) else f"crop {i}"
            height, width = pixels.shape[:2]
            shown.append(
                f'<figure><svg viewBox="0 0 {width} {height}" width="{_VIEW}">'
                f'<image width="{width}" height="{height}" href="{_data_url(pixels)}"/>{overlay}</svg>'
                f"<figcaption>{caption} · {len(pooled[i])} pooled tokens</figcaption></figure>"
            )
        return f'<div class="crops">{"".join(shown)}</div>'

    def tokens(self, example: dict[str, Any]) -> str:
        """The tokens, coloured by loss weight, a new line for every annotation; runs of image tokens as one."""
        ids, count = example["input_ids"], len(example["input_ids"])
        labels, weights = example.get("labels"), example.get("loss_masks", np.zeros(count))
        segments = example.get("subsegment_ids", np.zeros(count, np.int64))
        positions = example.get("position_ids", np.arange(count))
        top = max(float(weights.max(initial=0)), 1e-9)
        parts: list[str] = []
        i = 0
        while i < count:
            token, end = int(ids[i]), i + 1
            while token in self.tokenizer.image_token_ids and end < count and ids[end] == token:
                end += 1
            if i == 0 or segments[i] != segments[i - 1]:
                segment = int(segments[i]) % PACK_STRIDE
                parts.append(("</div>" if parts else "") + f'<div class="segment s{0 if segment == SHARED_SEGMENT else 1 + segment % 6}">')
            targeted = labels is not None and i > 0 and int(labels[i - 1]) == token and segments[i] == segments[i - 1]
            weight = float(weights[i - 1]) if targeted else 0.0
            where = f"{i}" if end == i + 1 else f"{i}-{end - 1}"
            tip = f"token {where}, id {token}, position {int(positions[i])}, segment {int(segments[i])}, weight {weight:.3g}"
            name = self._text(token) + (f"×{end - i}" if end > i + 1 else "")
            parts.append(_span(name, weight / top, tip, special=token in self.tokenizer.image_token_ids))
            following = int(ids[end]) if end < count and segments[end] == segments[end - 1] else None
            if labels is not None and weights[end - 1] > 0 and int(labels[end - 1]) != following:
                target, weight = int(labels[end - 1]), float(weights[end - 1])
                parts.append(_span(self._text(target), weight / top, f"target only, id {target}, weight {weight:.3g}", special=True))
            i = end
        return f'<div class="tokens">{"".join(parts)}</div></div>'

    def mask_section(self, row: dict[str, Any]) -> str:
        """The attention mask of a row as a picture."""
        allowed = self.mask(row["input_ids"], row.get("subsegment_ids"), row.get("loss_masks"))
        step = -(-len(allowed) // _MASK_PIXELS)
        shown = allowed[::step, ::step]
        pixels = np.where(shown[..., None], np.array([59, 110, 165], np.uint8), np.array([240, 243, 247], np.uint8))
        note = f"{len(allowed):,} tokens{f', every {step}th shown' if step > 1 else ''}; {100 * allowed.mean():.1f} % of the pairs attend"
        size = min(_MASK_PIXELS, max(_VIEW, len(shown)))
        return (
            f'<section class="mask"><h2>Mask of row 1</h2><p>{note}. Rows attend to columns: blue attends, grey does not.</p>'
            f'<img alt="attention mask" width="{size}" height="{size}" src="{_data_url(pixels, lossless=True)}"></section>'
        )

    def _text(self, token: int) -> str:
        if token < 0:
            return "∅"
        return self.tokenizer.decode([token], skip_special_tokens=False, truncate_at_eos=False)

    def _pixels(self, patches: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] of a crop's patches [n, p·p·3]."""
        (rows, cols), p = self.settings.crop_grid, self.settings.patch_size
        pixels = patches.reshape(rows, cols, p, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * p, cols * p, 3)
        if pixels.dtype != np.uint8:  # already normalised: stretched to what can be seen
            low, high = float(pixels.min()), float(pixels.max())
            pixels = (255 * (pixels - low) / max(high - low, 1e-6)).astype(np.uint8)
        return pixels

    def _pooled(self, example: dict[str, Any], patches: int) -> list[list[str]]:
        """Outlines of the pooled tokens of every crop."""
        (_, cols), p = self.settings.crop_grid, self.settings.patch_size
        shapes: list[list[str]] = [[] for _ in example["images"]]
        for name in (n for n in _POOLED if n in example):
            for k, index in enumerate(example[name]):
                used = index[index >= 0]
                if not len(used):
                    continue
                crop = int(used[0]) // patches
                place = used[used // patches == crop] % patches
                top, left, bottom, right = place.min() // cols, (place % cols).min(), place.max() // cols + 1, (place % cols).max() + 1
                shapes[crop].append(
                    f'<rect class="{name}" x="{left * p}" y="{top * p}" width="{(right - left) * p}" height="{(bottom - top) * p}">'
                    f"<title>{name}[{k}], patches {used.tolist()}</title></rect>"
                )
        return shapes

    def _outlines(self, example: dict[str, Any], content: tuple[float, float, float, float]) -> str:
        """Where the high-resolution crops lie on the whole image (single images only: of several, the crops do not say which is whose)."""
        sizes = (example.get("metadata") or {}).get("image_sizes") or []
        if len(sizes) != 1 or len(example["images"]) < 2:
            return ""
        (width, height), settings = sizes[0], self.settings
        tiling = image_tiling(height, width, settings)
        if tiling is None or 1 + tiling.rows * tiling.cols != len(example["images"]):
            return ""
        margin, p = sum(settings.overlap_margins), settings.patch_size
        canvas = ((tiling.rows * settings.window + margin) * p, (tiling.cols * settings.window + margin) * p)
        inner = (0.0, 0.0, float(canvas[0]), float(canvas[1]))
        if settings.resize_mode == "default":  # the image keeps its shape and is padded on the canvas
            scale = min(canvas[0] / height, canvas[1] / width)
            top, left = (canvas[0] - height * scale) / 2, (canvas[1] - width * scale) / 2
            inner = (top, left, top + height * scale, left + width * scale)
        shapes = []
        for i in range(tiling.rows * tiling.cols):
            row, col = divmod(i, tiling.cols)
            box = [settings.window * p * row, settings.window * p * col]
            box += [box[0] + settings.crop_size[0], box[1] + settings.crop_size[1]]
            shares = [(box[k] - inner[k % 2]) / (inner[2 + k % 2] - inner[k % 2]) for k in range(4)]
            y0, x0, y1, x1 = (np.clip(s, 0, 1) for s in shares)
            x, y = self._place(x0, y0, content)
            far_x, far_y = self._place(x1, y1, content)
            shapes.append(f'<rect class="crop c{i % 6}" x="{x:.1f}" y="{y:.1f}" width="{far_x - x:.1f}" height="{far_y - y:.1f}"/>')
        return "".join(shapes)

    def _points(self, example: dict[str, Any], times: Sequence[float] | None) -> dict[int, list[Point]]:
        """Points of the answers (what has loss) by the crop that shows them whole: of their image, or the frame next to their time."""
        weights = example.get("loss_masks")
        answers = example["input_ids"] if weights is None else example["labels"][weights > 0]
        found: dict[int, list[Point]] = {}
        whole = self._whole_crops(example)
        for point in extract_points(self.tokenizer.decode(answers, truncate_at_eos=False), 1000, 1000):
            if times is not None:
                crop = int(np.abs(np.asarray(times) - (point.block or 0.0)).argmin())
            else:
                crop = whole[min(max(int(point.block or 1), 1), len(whole)) - 1]
            found.setdefault(crop, []).append(point)
        return found

    def _whole_crops(self, example: dict[str, Any]) -> list[int]:
        """Number of the crop that shows each image whole."""
        sizes = (example.get("metadata") or {}).get("image_sizes") or []
        if len(sizes) < 2:
            return [0]
        counts = [image_token_counts(height, width, self.settings)[1] for width, height in sizes]
        return [0, *np.cumsum(counts)[:-1].tolist()] if sum(counts) == len(example["images"]) else [0]

    def _circle(self, point: Point, content: tuple[float, float, float, float]) -> str:
        x, y = self._place(point.x / 1000, point.y / 1000, content)
        radius = self.settings.crop_size[1] / 40
        return f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'

    def _place(self, x: float, y: float, content: tuple[float, float, float, float]) -> tuple[float, float]:
        """Pixels in the whole-image crop of a place given in shares of the image."""
        height, width = self.settings.crop_size
        top, left, bottom, right = content
        return width * (left + x * (right - left)), height * (top + y * (bottom - top))


def _content(mask: np.ndarray, grid: tuple[int, int]) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of the image inside a padded crop, in shares of it (the masks of patches at its edge are shares)."""
    shares = mask.reshape(grid)
    rows, cols = shares.max(1), shares.max(0)
    if not rows.any():
        return 0.0, 0.0, 1.0, 1.0
    edges = []
    for values in (rows, cols):
        used = np.flatnonzero(values > 0)
        start, stop = used[0], used[-1] + 1
        full = values.max()
        edges.append(((start + 1 - values[start] / full) / len(values), (stop - 1 + values[stop - 1] / full) / len(values)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _span(text: str, share: float, tip: str, special: bool) -> str:
    shown = html.escape(text).replace("\n", "⏎\n").replace(" ", "·" if not text.strip() else " ")
    style = f' style="--w:{share:.3f}"' if share > 0 else ""
    return f'<span class="{"t special" if special else "t"}{" loss" if share > 0 else ""}"{style} title="{html.escape(tip)}">{shown}</span>'


def _data_url(pixels: np.ndarray, lossless: bool = False) -> str:
    buffer = io.BytesIO()
    kind = "png" if lossless or min(pixels.shape[:2]) < 128 else "jpeg"
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
