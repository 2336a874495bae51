"""The text tokenizer, extended by the tokens that stand for images and video frames.

The embedding table of the language model has E rows; the special tokens are the rows after it, so their ids are E + index. They
are kept outside the text tokenizer: whatever a text contains, it never turns into an image token. `save` writes the complete
vocabulary (padding tokens up to E, then the special ones), which is the layout of the published checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TextTokenizer

from molmo_core.config import ConfigError
from molmo_core.tokens import IMAGE_PROMPT, POINT_TOKENS, SPECIAL_TOKENS, VIDEO_PROMPT, ImageTokenIds, TokenLayout, special_ids

_PADDING_PREFIX = "|<EXTRA_TOKENS_"
_POINT_PREFIXES = ("<POINT_", "<EXTRA_TOKENS_POINT_")  # what MolmoPoint's releases add behind the special tokens
_USUAL_EOS = ("<|endoftext|>", "<|im_end|>", "</s>", "<|end_of_text|>", "<eos>")
_CACHED_TEXTS = 8192
_LONG_TEXT = 4096
_NO_TOKEN = "\ufdd0"  # between the two halves of a name that is text; Unicode reserves the character for use inside a program


class TokenizerMissing(ConfigError, FileNotFoundError):
    """No tokenizer where the configuration says. The message says where to point it."""


class Tokenizer:
    """Byte-level BPE text tokenizer plus the special tokens of a model layout.

    Args:
        backend: the text tokenizer, without special image tokens.
        eos_token: end of a turn; also begins every sequence when there is no `bos_token` (as in all published models).
        first_special_id: id of the first special token, E of the model; None = right after the text vocabulary.
        layout: which special tokens exist (`molmo` or `molmo2`).
        config: other settings of tokenizer_config.json, kept for `save`.

    Raises:
        ValueError: `eos_token` is not in the vocabulary, or the vocabulary does not fit below `first_special_id`.
    """

    def __init__(
        self,
        backend: TextTokenizer,
        *,
        eos_token: str = "<|endoftext|>",
        bos_token: str | None = None,
        first_special_id: int | None = None,
        layout: TokenLayout = "molmo",
        config: dict[str, Any] | None = None,
    ):
        if layout not in SPECIAL_TOKENS:
            raise ValueError(f"unknown tokenizer layout {layout!r}; valid: {', '.join(SPECIAL_TOKENS)}")
        self.backend = backend
        self.layout = layout
        self.config = dict(config or {})
        self.text_vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.first_special_id = self.text_vocab_size if first_special_id is None else first_special_id
        if self.text_vocab_size > self.first_special_id:
            raise ValueError(
                f"the text tokenizer has {self.text_vocab_size} ids, but the model's embedding has only {self.first_special_id} rows; "
                "set llm.embedding_size (and llm.vocab_size) to at least the tokenizer's size"
            )
        self.eos_token = eos_token
        self.bos_token = bos_token or eos_token
        self.eos_token_id = self._text_id(eos_token)
        self.bos_token_id = self._text_id(self.bos_token)
        self.pad_token_id = -1
        self.special_tokens = special_ids(layout, self.first_special_id)
        self._special_names = {i: t for t, i in self.special_tokens.items()}
        ids = ImageTokenIds.of(layout, self.first_special_id)
        self.image_start_token_id, self.image_end_token_id = ids.start, ids.end
        self.image_patch_token_id, self.image_col_token_id, self.image_low_token_id = ids.patch, ids.col, ids.low
        self.low_res_image_start_token_id = ids.low_res_start
        self.frame_start_token_id, self.frame_end_token_id = ids.frame_start, ids.frame_end
        self.image_prompt_token_id = self.special_tokens[IMAGE_PROMPT]
        self.video_prompt_token_id = self.special_tokens.get(VIDEO_PROMPT)
        self.point_token_ids = tuple(self.special_tokens[name] for name in POINT_TOKENS if name in self.special_tokens)
        self._text_names = _names_in_text([t.content for t in backend.get_added_tokens_decoder().values() if t.special])
        self._all_names = _names_in_text([*self._text_names, IMAGE_PROMPT, VIDEO_PROMPT])
        self._encode = lru_cache(_CACHED_TEXTS)(self._encode_uncached)

    @classmethod
    def load(
        cls,
        identifier: str | Path,
        *,
        first_special_id: int | None = None,
        layout: TokenLayout = "molmo",
        cache_dir: str | Path | None = None,
    ) -> Tokenizer:
        """Reads a folder that holds tokenizer.json, or a hub repository (its local cache first).

        Raises:
            TokenizerMissing: no tokenizer.json there.
            ConfigError: it is damaged.
            ValueError: the file already holds special tokens, at other ids than this model uses.
        """
        path, config_path = _find_files(str(identifier), cache_dir)
        backend, extra = _without_special_tokens(path.read_text(encoding="utf-8"), path)
        config = _json(config_path.read_text(encoding="utf-8"), config_path) if config_path else {}
        eos = _token_name(config.get("eos_token"))
        if eos is None:
            candidates = [t for t in _USUAL_EOS if backend.token_to_id(t) is not None]
            if len(candidates) != 1:
                raise ValueError(f"{path}: which token ends a text ({candidates})? Name it as eos_token in tokenizer_config.json beside it")
            eos = candidates[0]
        tokenizer = cls(
            backend,
            eos_token=eos,
            bos_token=_token_name(config.get("bos_token")),
            first_special_id=first_special_id,
            layout=layout,
            config=config,
        )
        for name, token_id in tokenizer.special_tokens.items():
            if extra.get(name, token_id) != token_id:
                raise ValueError(
                    f"{path}: {name} has id {extra[name]}, but a {layout!r} model whose embedding has {tokenizer.first_special_id} rows "
                    f"expects {token_id}; check llm.embedding_size and llm.vocab_size"
                )
        return tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same ids for every text and every special token, wherever they were read from."""
        parts = [self.backend.to_str(), self.eos_token, self.bos_token, self.layout, self.first_special_id]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return self.first_special_id + len(self.special_tokens)

    @property
    def image_token_ids(self) -> frozenset[int]:
        """Ids that only media produce: they never carry loss."""
        return frozenset(self.special_tokens.values())

    @functools.cached_property
    def max_bytes_per_token(self) -> int:
        """No text has fewer tokens than its bytes in UTF-8 divided by this."""
        longest = max(len(token.encode()) for token in self.backend.get_vocab(with_added_tokens=True))
        return longest * (1 if self.backend.normalizer is None else 3)  # composing characters (NFC) shortens a text to a third at most

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Adds no begin or end token.

        Special tokens of the text tokenizer itself (`<|endoftext|>`, chat turns) are recognised, as templates need it: text of records
        and users goes through `literal` first. What looks like an image token stays text.
        """
        return list(self._encode(text) if len(text) < _LONG_TEXT else self._encode_uncached(text))

    def literal(self, text: str, placeholders: bool = False) -> str:
        """A text in which names of special tokens are text: `encode` gives the tokens of their characters.

        Args:
            placeholders: the places of media (`<|image|>`, `<|video|>`), too, stay text.
        """
        names = self._all_names if placeholders else self._text_names
        cuts = [found.start() + cut for name, cut in names.items() if name in text for found in re.finditer(f"(?={re.escape(name)})", text)]
        if not cuts:
            return text
        ends = [0, *sorted(cuts), len(text)]
        return _NO_TOKEN.join(text[start:end] for start, end in itertools.pairwise(ends))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, truncate_at_eos: bool = True) -> str:
        """Text of generated ids.

        Args:
            ids: token ids (list, array or tensor); negative ones (padding) are ignored.
            skip_special_tokens: leave out special tokens; otherwise they are written as their names.
            truncate_at_eos: drop a leading begin token and everything from the first end token on.
        """
        tokens = [i for i in map(int, ids) if i >= 0]
        if truncate_at_eos:
            if tokens and tokens[0] in (self.bos_token_id, self.eos_token_id):
                tokens = tokens[1:]
            if self.eos_token_id in tokens:
                tokens = tokens[: tokens.index(self.eos_token_id)]
        if skip_special_tokens:
            return self.backend.decode([i for i in tokens if i < self.text_vocab_size], skip_special_tokens=True)
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token < self.text_vocab_size:
                run.append(token)
                continue
            parts += [self.backend.decode(run, skip_special_tokens=False), self._special_names.get(token, f"<{token}>")]
            run = []
        return "".join([*parts, self.backend.decode(run, skip_special_tokens=False)])

    def id_to_token(self, token_id: int) -> str:
        """Name of one id as it is in the vocabulary (padding rows of the embedding included)."""
        if token_id in self._special_names:
            return self._special_names[token_id]
        return self.backend.id_to_token(token_id) or f"{_PADDING_PREFIX}{token_id - self.text_vocab_size}>|"

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of the text of one id: part of a character where the vocabulary cuts it; nothing for special tokens and padding."""
        added = self.backend.get_added_tokens_decoder().get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode()
        name = self.backend.id_to_token(token_id) if token_id < self.text_vocab_size else None
        table = _bytes_of_characters()
        return bytes(table[c] for c in name) if name and all(c in table for c in name) else (name or "").encode()

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json (padded to E, then the special tokens) and tokenizer_config.json; `load` and transformers read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = json.loads(self.backend.to_str())
        padding = [f"{_PADDING_PREFIX}{i}>|" for i in range(self.first_special_id - self.text_vocab_size)]
        for token_id, name in enumerate([*padding, *self.special_tokens], self.text_vocab_size):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            data["added_tokens"].append({"id": token_id, "content": name, **flags})
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, "pad_token": self.eos_token}
        config |= {k: v for k, v in self.config.items() if k not in ("added_tokens_decoder", "extra_special_tokens")}
        config |= {"eos_token": self.eos_token, "extra_special_tokens": list(self.special_tokens)}
        if self.bos_token != self.eos_token:
            config["bos_token"] = self.bos_token
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if _NO_TOKEN in text:
            return tuple(token for part in text.split(_NO_TOKEN) for token in self._encode_uncached(part))
        if len(text) < _LONG_TEXT:
            return tuple(self.backend.encode(text, add_special_tokens=False).ids)
        # The same tokens; other threads run meanwhile, and no offsets are computed.
        return tuple(self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _text_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"token {token!r} is not in the tokenizer's vocabulary ({self.text_vocab_size} tokens)")
        return int(token_id)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encode = lru_cache(_CACHED_TEXTS)(self._encode_uncached)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself if it is visible, else the next ones from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _names_in_text(names: Iterable[str]) -> dict[str, int]:
    """Where a name is cut when it is text: behind its first marks, where text is cut into words anyway."""
    return {name: max(1, len(re.match(r"\W*", name)[0]) % len(name)) for name in names}  # type: ignore[index]


def _without_special_tokens(text: str, source: Path) -> tuple[TextTokenizer, dict[str, int]]:
    """The tokenizer of a tokenizer.json without its padding and image tokens, and those tokens with their ids."""
    known = {t for tokens in SPECIAL_TOKENS.values() for t in tokens}
    padding = (_PADDING_PREFIX, *_POINT_PREFIXES)
    if not any(prefix in text for prefix in padding) and not any(t in text for t in known):  # parsing it twice is slow
        return _parsed(text, source), {}
    data = {"added_tokens": [], **_json(text, source)}
    extra = {t["content"]: t["id"] for t in data["added_tokens"] if t["content"] in known or t["content"].startswith(padding)}
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in extra]
    return _parsed(json.dumps(data), source), extra


def _json(text: str, source: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: not readable as a JSON object ({error}); copy or download it again") from error


def _parsed(text: str, source: Path) -> TextTokenizer:
    try:
        return TextTokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{source}: no tokenizer file, or damaged ({error}); copy or download it again") from error


def _token_name(value: Any) -> str | None:
    """`eos_token` and its like are strings or {"content": ...} in tokenizer_config.json."""
    return value.get("content") if isinstance(value, dict) else value


def _find_files(identifier: str, cache_dir: str | Path | None) -> tuple[Path, Path | None]:
    folder = Path(identifier)
    if folder.is_file() and folder.name == "tokenizer.json":
        folder = folder.parent
    if folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerMissing(
                f"{folder}: no tokenizer.json there; transformers writes one from older files: "
                f"AutoTokenizer.from_pretrained({identifier!r}).save_pretrained({identifier!r})"
            )
        config = folder / "tokenizer_config.json"
        return path, config if config.is_file() else None
    if folder.is_absolute() or identifier.startswith(".") or identifier.count("/") != 1:
        raise TokenizerMissing(
            f"{identifier}: no such tokenizer folder (llm.tokenizer.identifier; a checkpoint folder has its own, tokenizer/)"
        )
    return _hub_file(identifier, "tokenizer.json", cache_dir), _hub_file(identifier, "tokenizer_config.json", cache_dir)


def _hub_file(repository: str, name: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not cached yet
    try:
        return Path(hf_hub_download(repository, name, cache_dir=cache_dir))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise TokenizerMissing(
            f"tokenizer {repository!r}: no such folder, and {name} is neither in the local hub cache nor reachable on the hub ({error}); "
            "point llm.tokenizer.identifier to a folder with tokenizer.json"
        ) from error
