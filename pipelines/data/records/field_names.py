"""What the name of a field says: whether it describes the record or changes its meaning, and which medium it holds or speaks of."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from pipelines.data.records.content import Medium


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DESCRIBES = _words("""
    id ids uuid guid hash sha md phash checksum etag source sources origin dataset datasets subset corpus collection split splits fold
    shard partition url urls uri uris link links href homepage domain file files filename path paths name names author authors artist
    creator owner annotator annotators worker contributor publisher license licence licenses licences copyright attribution credit
    credits citation doi generator model models version revision release format method provider platform country email
    date dates datetime created updated modified timestamp year
    type types kind category categories topic topics genre difficulty tag tags keyword keywords quality score scores rating ratings
    vote votes likes confidence similarity probability rank perplexity nsfw toxicity watermark pwatermark punsafe aesthetic size sizes
    width height widths heights resolution shape length lengths tokens duration fps nframes pixels exif detail camera comment comments
    note notes remark remarks meta metadata info extra extras misc debug error
""")
"""Last words of the names that describe a record: who, where from, when, what kind, how good, how large. `answer_type` describes,
`model_answer` does not."""
_DESCRIBES_WHOLE = _words("key __key__ __url__ index idx status class cache_control level subject no nr")
COUNTS = _words("num n nb number has count")
TRAINS = _words("loss weight weights mask masks masked train trainable trained training ignore reward")
SYSTEM = _words("system instruction instructions persona role developer")
OPTIONS = _words("option options choice choices candidate candidates distractor distractors alternatives")
ANSWERS = _words("""
    answer answers ans response responses reply output outputs completion completions target targets solution solutions gold truth gt
    correct chosen rejected explanation rationale reasoning thought thoughts thinking cot caption captions description descriptions
    transcript transcripts summary label labels point points
""")
_ASKS = _words("""
    prompt prompts query question questions input inputs context contexts passage paragraph document history dialog dialogue conversation
    conversations message messages turn turns hint hints knowledge background premise hypothesis text texts language languages lang
    locale tool tools function functions bbox bboxes box boxes region regions crop segmentation polygon polygons rotation start end begin
    stop clip offset subtitle subtitles asr count counts timestamps tracks
""")
CHANGES = TRAINS | SYSTEM | OPTIONS | ANSWERS | _ASKS
"""Words of the names that change what is asked, answered or trained."""

_MEDIA: dict[Medium, frozenset[str]] = {
    "image": _words("image images img imgs pic pics picture pictures photo photos photograph screenshot screenshots jpg jpeg png webp"),
    "video": _words("video videos movie mp4 webm mov mkv avi"),
    "audio": _words("audio audios sound sounds speech voice wav mp3"),
}
_CARRIES = _words("file files filename filenames path paths url urls uri uris bytes data base64 b64 raw")
_PLAIN_FILE = _words("file files filename path name local filepath")
_WITH_DIGITS = _CARRIES | _MEDIA["video"] | _MEDIA["audio"]
UNCLEAR = _words("""
    thumbnail thumb thumbs mask masks depth segmentation seg heatmap saliency normal edge edges pose sketch before after original edited
    target reference source negative positive rejected chosen output generated augmented crop cropped
""")
"""Words of pictures that may not be the one that is asked about."""
LETTERS = _words("a b c d e f g h i j")
"""Names of the columns of options in some data sets."""


class FieldName(NamedTuple):
    """A name, understood."""

    words: frozenset[str]
    describes: bool
    changes: bool
    medium: Medium | None
    """The kind of medium that a field of this name holds (`img_path`)."""
    speaks_of: Medium | None
    """The kind of medium that it has to do with (`image_id`)."""
    is_file: bool
    """Whether it only says that its value is a file (`file_name`)."""


@functools.lru_cache(4096)
def understood(name: str) -> FieldName:
    """What a name says; words are divided by case, spaces and signs, and numbers at their ends do not count."""
    parts = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    words = [word if word in _WITH_DIGITS else word.rstrip("0123456789") or word for word in parts]
    named = [word for word in words if not word.isdecimal()]
    stem = [word for word in named if word not in _CARRIES]
    describes = bool(named) and (named[-1] in DESCRIBES or name.lower() in _DESCRIBES_WHOLE)
    column = len(words) == 1 and words[0] in LETTERS
    return FieldName(
        frozenset(words),
        describes,
        not describes and (column or bool(CHANGES & set(words))),
        next((kind for kind, known in _MEDIA.items() if stem and stem[-1] in known), None),
        next((kind for kind, known in _MEDIA.items() if known & set(words)), None),
        bool(words) and set(words) <= _PLAIN_FILE,
    )
