"""Where byte-level BPE cuts a text before it merges: the patterns of GGUF's key ``tokenizer.ggml.pre``, and our own.

A GGUF file names its pattern, it does not hold it; the names and their patterns are those of llama.cpp
(`llama-vocab.cpp`). Where llama.cpp only approximates the pattern a family was trained with (its regular expressions
know no case of letters beyond ASCII), the family's own is here. No token crosses a cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, pre_tokenizers

# ---- the parts they are made of

ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # it's, don't, we'll
ENDINGS_OF_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the same, but that it takes 'ſ (a long s) for 's
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A word takes the one character before it, blank or not; punctuation takes the newlines behind it.
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN2 = rf"{ENDINGS}|{WORD}|\p{{N}}|{PUNCTUATION}|{BLANKS}"
LLAMA3 = rf"{ENDINGS}|{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{BLANKS}"
# A word of GPT-4o ends where a capital follows small letters: snakeCase, HTTPServer.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
GPT4O = rf"{CASED[0]}{ENDINGS_OF_ANY_CASE}?|{CASED[1]}{ENDINGS_OF_ANY_CASE}?"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
KANA_AND_HAN = "[一-龥\u3040-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    rf"{ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BLANKS}"
)
HAN_OF_DEEPSEEK = "[一-龥\u0800-一가-퟿]+"
CASED_LETTERS = (  # of the Unicode of its day
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokens:
    """How a text is cut.

    Attributes:
        patterns: each cuts what those before it have left, at the ends of its matches.
        ignore_merges: a piece that is a token as it stands is taken whole, whatever its merges would give.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer, which also writes the bytes in GPT-2's alphabet."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2, _QWEN2, _BLOOM = PreTokens((GPT2,)), PreTokens((QWEN2,)), PreTokens((BLOOM,))
_LLAMA3, _LLAMA3_WHOLE = PreTokens((LLAMA3,)), PreTokens((LLAMA3,), ignore_merges=True)
_SINGLE_DIGITS = PreTokens((r"\p{N}", GPT2))
_GPT4O = PreTokens((rf"{GPT4O}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",))
_DEEPSEEK3 = PreTokens((r"\p{N}{1,3}", KANA_AND_HAN, DEEPSEEK3))
_BAILING = PreTokens((rf"{ENDINGS}|{WORD}|\p{{N}}|{PUNCTUATION}|\s*[\r\n]|\s+(?!\S)|\s+",))

PRE_TOKENS: Final[dict[str, PreTokens]] = {
    # Where two names mean the same, the first is the one an export writes.
    "qwen2": _QWEN2,
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open", "grok-2"), _QWEN2),
    "stablelm2": _QWEN2,
    "qwen35": PreTokens((rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                         rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{BLANKS}",)),
    "llama-bpe": _LLAMA3_WHOLE,
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3_WHOLE),
    **dict.fromkeys(("jina-v5-nano", "glm4", "glm5"), _LLAMA3_WHOLE),
    "dbrx": _LLAMA3,
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe"), _LLAMA3),
    "gpt-4o": _GPT4O,
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    "tekken": PreTokens((TEKKEN,), ignore_merges=True),
    "smollm": _SINGLE_DIGITS,
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), _SINGLE_DIGITS),
    **dict.fromkeys(("minerva-7b", "mellum2"), _SINGLE_DIGITS),
    "gpt-2": _GPT2,
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code"), _GPT2),
    **dict.fromkeys(("roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert"), _GPT2),
    "deepseek-coder": PreTokens((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_OF_DEEPSEEK, r"\p{N}")),
    "deepseek-llm": PreTokens((r"[\r\n]", rf"\s?[{CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
                               HAN_OF_DEEPSEEK, r"\p{N}+")),
    "deepseek-v3": _DEEPSEEK3,
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "falcon": PreTokens((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "bloom": _BLOOM,
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), _BLOOM),
    "viking": PreTokens((BLOOM, r"\p{N}")),
    "bailingmoe": _BAILING,
    **dict.fromkeys(("bailingmoe2", "llada-moe"), _BAILING),
    "seed-coder": PreTokens((rf"{ENDINGS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BLANKS}",)),
    # What llama.cpp falls back to where a file names nothing.
    "default": PreTokens((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}  # fmt: skip

EQUIVALENT: Final[dict[str, str]] = {
    pattern.replace(ENDINGS, ENDINGS_OF_ANY_CASE): pattern
    for pre in PRE_TOKENS.values()
    for pattern in pre.patterns
    if ENDINGS in pattern
}
"""Patterns as model folders write them -> as they are here; they differ only in a long s behind an apostrophe."""

# ---- our own, which llama.cpp does not know

# It follows GPT-4's (a word takes the one character before it, blank or not: " word", ".attribute", "_part"), with
# these changes:
SCRIPTS_OF_THEIR_OWN = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
OWN_PATTERN = "|".join(
    (
        # "it's": the ending is cut off only behind a letter and at the end of a word, since in code 'start' is a
        # string, not 's + tart.
        r"(?<=\p{L})'(?i:s|t|re|ve|m|ll|d)(?!\p{L})",
        # Scripts written without blanks: apart from other scripts, and in stretches of at most 12, or a whole sentence
        # would be a piece and frequent sentences would become tokens (cl100k and Qwen have such ones). Costs 1 % of
        # compression on Chinese.
        r"\p{Han}{1,12}|[\p{Hiragana}ー]{1,12}|[\p{Katakana}ー]{1,12}|[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]{1,12}",
        r"[^\r\n\p{L}\p{N}]?\p{Hangul}+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^" + SCRIPTS_OF_THEIR_OWN + "]]+",
        # One or two digits: three would spend a tenth of a small vocabulary on numbers, one makes every number longer.
        r"\p{N}{1,2}",
        # Punctuation, with the newline and the indentation behind it: `):` and the start of the next line are one
        # token. In source code this gives 4 % more bytes per token than GPT-4's way, which leaves the last blank of
        # the indentation to the next word.
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?",
        r"\s*[\r\n]+[ \t]*",
        r"\s+(?!\S)|\s+",
    )
)
OWN = PreTokens((OWN_PATTERN,))
