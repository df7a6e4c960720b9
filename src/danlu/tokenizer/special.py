"""The special tokens of a tokenizer trained here. They come first in the vocabulary, in this order."""

from __future__ import annotations

from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
"""Begins every document, and so ends the one before it: beginning of sequence and document separator in one."""
PAD: Final = "<|pad|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"

# What a model writes for a program to read. Decoders keep these when they leave out special tokens, as those of Qwen
# and Hermes do.
THINK: Final = ("<think>", "</think>")
TOOL_CALL: Final = ("<tool_call>", "</tool_call>")
TOOL_RESPONSE: Final = ("<tool_response>", "</tool_response>")
KEPT_WHEN_DECODED: Final = THINK + TOOL_CALL + TOOL_RESPONSE

# Fill in the middle (Bavarian et al. 2022, arXiv:2207.14255).
FIM: Final = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")

# Rows of the embedding that a later stage can give a meaning to without changing any shape.
RESERVED: Final = tuple(f"<|reserved_{i}|>" for i in range(6))

SPECIAL_TOKENS: Final = (END_OF_TEXT, PAD, IM_START, IM_END, *KEPT_WHEN_DECODED, *FIM, *RESERVED)

STOPS: Final = (IM_END, END_OF_TEXT, "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "</s>")
"""Names under which model families end a turn or a text; generation stops at those a vocabulary holds."""
