"""Prompts of every kind as the tokens that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from danlu.engine.request import token_ids
from danlu.errors import DanluError
from danlu.server.protocol import ChatPrompt, Prompt, TextPrompt
from danlu.tokenizer.special import FIM
from danlu.tokenizer.tokenizer import Tokenizer

GAP_TOKENS = (FIM[:3], ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), ("<|PREFIX|>", "<|MIDDLE|>", "<|SUFFIX|>"))
"""Prefix, middle and suffix round a gap, as families call them."""

NORMALIZED = 4
"""A tokenizer that normalizes text makes it shorter, by less than this."""


class PromptReader:
    """Reads prompts for one model; any thread may use it.

    Args:
        for_encoder: the model is an encoder-decoder, which answers texts and knows no chats.

    Attributes:
        tokenizer: the model's, or with the chat template of an adapter.
        template: source of the chat template; empty where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, *, for_encoder: bool = False) -> None:
        self.tokenizer, self._for_encoder = tokenizer, for_encoder
        self._longest_token = int(tokenizer.token_bytes().max())
        self.template = "" if for_encoder else str(tokenizer.config.get("chat_template") or "")

    @cached_property
    def gap_tokens(self) -> tuple[str, ...] | None:
        """The tokens by which a gap is filled, if the tokenizer has them."""
        if self._for_encoder:
            return None
        for tokens in GAP_TOKENS:
            try:
                if all(self.tokenizer.is_special(self.tokenizer.id_of(token)) for token in tokens):
                    return tokens
            except DanluError:
                continue
        return None

    def require_near_room(self, prompt: Prompt, which: str, context: int) -> None:
        """Refuse at once what cannot fit by far: splitting megabytes into tokens takes up to a minute."""
        match prompt:
            case ChatPrompt():
                size = sum(len(text) for one in prompt.messages if isinstance(text := one.get("content"), str))
            case TextPrompt():
                size = len(prompt.text)
            case _:
                return
        if size > NORMALIZED * self._longest_token * context:
            raise DanluError(
                f"{which}: has {size} characters, far more than the model's context of {context} tokens; shorten it"
            )

    def ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DanluError: the model cannot read it.
        """
        if isinstance(prompt, ChatPrompt):
            return self._chat_ids(prompt)
        if isinstance(prompt, TextPrompt):
            return self._text_ids(prompt)
        return prompt.ids

    def _chat_ids(self, prompt: ChatPrompt) -> list[int]:
        if not self.template:
            raise DanluError("messages: this model has no chat template; use /v1/completions")
        messages, begun = prompt.messages, ""
        if prompt.continue_last:
            messages, begun = messages[:-1], messages[-1].get("content") or ""
        ids = self.tokenizer.encode_chat(
            messages,
            add_generation_prompt=prompt.generation_prompt,
            tools=prompt.tools,
            template_options=prompt.template_options,
        )
        return ids + self.tokenizer.encode(begun) if begun else ids

    def _text_ids(self, prompt: TextPrompt) -> list[int]:
        if not prompt.special_tokens:
            return self.tokenizer.encode(prompt.text)
        if prompt.suffix is None:
            return token_ids(prompt.text, self.tokenizer, "the prompt", for_encoder=self._for_encoder)
        tokens = self.gap_tokens
        if tokens is None:
            raise DanluError("suffix: this model has no tokens for filling a gap; leave it out")
        prefix, middle, suffix = map(self.tokenizer.id_of, tokens)
        begin = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        encode = self.tokenizer.encode
        return [*begin, prefix, *encode(prompt.text), suffix, *encode(prompt.suffix), middle]


def known(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Token ids, all of them of the vocabulary."""
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise DanluError(f"tokens: has ids outside the vocabulary of {tokenizer.vocab_size}; use the model's tokenizer")
    return list(ids)
