"""Raw captions: what the web wraps around a description is taken off, and what then describes nothing is dropped."""

import re
import unicodedata
from functools import cache


URL = re.compile(r"(?:https?://|www\.)\S+|\b[\w-]+\.(?:com|net|org|tv|io|ly)(?:/\S*)?\b", re.I)
TAG = re.compile(r"(?<!\w)[#@][\w.]+")
MARKUP = re.compile(r"<[^<>]{1,200}>|&[a-z]+;|&#\d+;")
FILE_NAME = re.compile(
    r"^(?:(?:IMG|VID|DSC|DSCN|MVI|MOV|PXL|GOPR|GX\d\d|P\d{3}|WIN|Screen[ _-]?Recording|clip|video|untitled|final)"
    r"[\w ().-]*\d[\w ().-]*|[\w().-]+)\.?(?:mp4|mov|avi|mkv|webm|m4v|wmv|flv)$"
    r"|^(?:IMG|VID|DSC|DSCN|MVI|PXL|GOPR)[_ -]?\d[\w-]*$",
    re.I,
)
CREDITS = re.compile(
    r"\b(?:directed|produced|written|edited|filmed|shot|music|lyrics|footage|video|photo|courtesy|copyright|credits?)"
    r"(?:\s+(?:by|of|to|courtesy)\b|\s*[:©])|©|\(c\)\s*\d{4}|\ball rights reserved\b",
    re.I,
)
WRAPPINGS = re.compile(
    r"(?:watch|see|check)\s+(?:this|it|out|now)+\s*[:!-]*|\(?\bofficial\s+(?:clip|video|trailer|music video)\)?"
    r"|\bnew video\b|\b(?:please\s+)?(?:like,?\s+(?:comment,?\s+)?(?:share\s+)?(?:and|&)\s+)?subscribe\b"
    r"(?:\s+(?:to|for)\s+(?:my|our|the|more)\s*(?:channel|videos?)?)?"
    r"|\blink in (?:the )?(?:bio|description)\b|\bclick (?:the )?(?:link|here|bell)\b(?: below)?"
    r"|\bfollow (?:me|us)(?: on \w+)?|\bstock (?:video|footage)\b|\bfree download\b|\b(?:4k|hd|1080p|720p)\b",
    re.I,
)
BOILERPLATE = frozenset(
    "subscribe channel like share comment follow click bell notification notifications link bio description below "
    "watch video videos official clip trailer new full hd free download episode part more thanks thank please "
    "sign up join today now stock footage sponsored ad ads music instagram facebook twitter tiktok youtube".split()
)
LANGUAGE_CHARACTERS = 600  # Not in the paper: so much of a text tells its language
LITTLE = frozenset("a an and at by for from in my of on our out the this to up us with your you is it all".split())
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words_of(text):
    return WORD.findall(text)


def count_words(text):
    """Words of a text, as the word ranges of the captions count them: what blanks part."""
    return len(text.split())


def rectify(text):
    """The caption without addresses, tags, markup, pictographs and what only announces a video."""
    text = unicodedata.normalize("NFKC", text)
    for pattern in (MARKUP, URL, TAG, WRAPPINGS):
        text = pattern.sub(" ", text)
    text = "".join(" " if unicodedata.category(c) in ("So", "Cs", "Co", "Cn", "Cc") else c for c in text)
    text = re.sub(r"([!?.,;:|*~_=-])\1+", r"\1", text)
    text = re.sub(r"\s+([!?.,;:])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" !|*~_=-:;,•·")


def why_not_descriptive(raw, min_words, language):
    """The name of the reason why a raw caption describes nothing, or None where it may.

    Args:
        raw (`str`): as it was found.
        min_words (`int`): least words after [`rectify`].
        language (`str`, *optional*): ISO 639-1 code that it has to be in; None takes all.
    """
    if not raw.strip():
        return "text_empty"
    if FILE_NAME.match(raw.strip()):
        return "text_file_name"
    text = rectify(raw)
    words = [word.lower() for word in words_of(text)]
    if len(words) < min_words:
        for name, pattern in (("text_url", URL), ("text_hashtags", TAG), ("text_boilerplate", WRAPPINGS)):
            if pattern.search(raw):
                return name
        return "text_too_short"
    if CREDITS.search(text) and len(CREDITS.findall(text)) * 6 >= len(words):
        return "text_credits"
    telling = [word for word in words if word not in BOILERPLATE and word not in LITTLE]
    if len(telling) < max(2, 0.4 * sum(word not in LITTLE for word in words)):
        return "text_boilerplate"
    if len(set(words)) < max(2, 0.25 * len(words)):
        return "text_repetitive"
    if language is not None and not is_language(text, language):
        return "text_language"
    return None


def is_language(text, language):
    """Whether the text may be in the language: short texts get the benefit of the doubt, a foreign script none."""
    letters = [c for c in text if c.isalpha()]
    if language == "en" and letters and sum(c.isascii() for c in letters) < 0.7 * len(letters):
        return False
    text = text[:LANGUAGE_CHARACTERS]
    best, confidence = _identifier().classify(text)
    if best == language or len(words_of(text)) < 4:
        return True
    ranking = dict(_identifier().rank(text))
    # Not in the paper: another language must be clearly likelier.
    return confidence < 0.6 or ranking.get(language, 0.0) > 0.05


@cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def normal_form(text):
    """Lower-case words alone: equal for texts that say the same letter by letter."""
    return " ".join(word.lower() for word in words_of(text))


def ngrams(text, n):
    words = normal_form(text).split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()
