"""Answers of encoder-decoders against transformers' `generate`, and against themselves without neighbours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoders import END, FIRST, LETTERS, PAD, LetterTokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    NoRepeatNGramLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from danlu.engine.config import SamplingParams
from danlu.engine.generate import generate_text
from danlu.engine.seq2seq import repeating
from danlu.errors import DanluError
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
TEXTS = ["ab", "thequickbrownfox", "zzzzzzz", "b", "jumpsover", "thelazydog"]


TOKENIZER: Any = LetterTokenizer()


def randomise(reference: Any, seed: int) -> Any:
    """Weights whose answers differ in length and letters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in reference.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.35)
    return reference.float().eval()


@pytest.fixture(scope="module")
def t5() -> Any:
    """Its decoder is not the deeper part: transformers would not find room in its cache."""
    config = T5Config(
        vocab_size=LETTERS, d_model=32, d_kv=8, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=PAD,
        tie_word_embeddings=False,
    )  # fmt: skip
    reference = T5ForConditionalGeneration(config)
    reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.clone())
    return randomise(reference, 0)


@pytest.fixture(scope="module")
def bart() -> Any:
    config = BartConfig(
        vocab_size=LETTERS, d_model=32, max_position_embeddings=24, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=48,
        pad_token_id=PAD, bos_token_id=FIRST, eos_token_id=END, decoder_start_token_id=END, forced_eos_token_id=None,
    )  # fmt: skip
    reference = randomise(BartForConditionalGeneration(config), 5)
    reference.final_logits_bias[:, END] = 2.0
    return reference


def both(reference: Any, folder: Path, demands: dict[str, Any]) -> tuple[EncoderDecoder, Any]:
    """danlu's model and theirs, with these fields in `generation_config.json`."""
    reference = copy.deepcopy(reference)
    reference.generation_config.update(**demands)
    reference.save_pretrained(folder)
    return load_model(folder, EncoderDecoder), reference


def generated(reference: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """What transformers answers, without start, end and padding."""
    rows = [TOKENIZER.encode_for_encoder(text)[0] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    found = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)[:, 1:].tolist()
    return [row[: row.index(END)] if END in row else row for row in found]


DEMANDS: list[dict[str, Any]] = [
    {},
    {"forced_bos_token_id": FIRST, "forced_eos_token_id": END},
    {"no_repeat_ngram_size": 2, "min_length": 8},
    {"no_repeat_ngram_size": 3, "min_new_tokens": 5, "forced_eos_token_id": [END]},
    {"no_repeat_ngram_size": 1, "forced_bos_token_id": 7},
]


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("demands", DEMANDS)
def test_greedy_is_what_transformers_generates(
    name: str, demands: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, reference = both(request.getfixturevalue(name), tmp_path, demands)
    answers = generate_text(model, TOKENIZER, TEXTS, GREEDY)
    assert [answer.token_ids for answer in answers] == generated(reference, TEXTS)
    assert [answer.text for answer in answers] == [TOKENIZER.decode(answer.token_ids) for answer in answers]
    assert len({answer.text for answer in answers}) > 3


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("demands", DEMANDS)
def test_beam_search_finds_what_transformers_finds(
    name: str, demands: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, reference = both(request.getfixturevalue(name), tmp_path, demands)
    for beams, length_penalty, early in (
        (4, 1.0, False),
        (3, 2.0, True),
        (2, -0.5, False),
        (5, 0.0, True),
        (4, 2.0, False),
    ):
        options = {"length_penalty": length_penalty, "early_stopping": early}
        answers = generate_text(model, TOKENIZER, TEXTS, replace(GREEDY, beams=beams, **options))
        expected = generated(reference, TEXTS, num_beams=beams, **options)
        assert [answer.token_ids for answer in answers] == expected, (beams, options)


def test_beam_search_is_not_greedy(t5: Any, tmp_path: Path) -> None:
    """Or the tests above would not tell one from the other."""
    model, _ = both(t5, tmp_path, {})
    beams = generate_text(model, TOKENIZER, TEXTS, replace(GREEDY, beams=4))
    assert beams != generate_text(model, TOKENIZER, TEXTS, GREEDY)


def test_repetition_penalty_is_that_of_transformers(bart: Any, tmp_path: Path) -> None:
    model, reference = both(bart, tmp_path, {})
    params = SamplingParams(temperature=0, max_new_tokens=12, repetition_penalty=1.7)
    answers = generate_text(model, TOKENIZER, TEXTS, params)
    assert [answer.token_ids for answer in answers] == generated(reference, TEXTS, repetition_penalty=1.7)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_does_not_depend_on_its_neighbours(beams: int, t5: Any, tmp_path: Path) -> None:
    model, _ = both(t5, tmp_path, {})
    options = {"temperature": 0.9 if beams == 1 else 0.0, "beams": beams}
    params = [SamplingParams(**options, seed=i, max_new_tokens=4 + 3 * i) for i in range(len(TEXTS))]
    together = generate_text(model, TOKENIZER, TEXTS, params)
    alone = [generate_text(model, TOKENIZER, [text], p) for text, p in zip(TEXTS, params, strict=True)]
    assert together == [answer for (answer,) in alone]
    assert together == generate_text(model, TOKENIZER, TEXTS, params, batch_size=2)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings_cut_the_text(beams: int, t5: Any, tmp_path: Path) -> None:
    model, _ = both(t5, tmp_path, {"min_length": 13})
    params = replace(GREEDY, beams=beams)
    (whole,) = generate_text(model, TOKENIZER, ["thelazydog"], params)
    stop = whole.text[4:6]
    (cut,) = generate_text(model, TOKENIZER, ["thelazydog"], replace(params, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")


def test_a_forced_end_is_not_the_models_own(bart: Any, tmp_path: Path) -> None:
    model, _ = both(bart, tmp_path, {"forced_eos_token_id": END, "min_length": 13})
    for beams in (1, 2):
        answers = generate_text(model, TOKENIZER, TEXTS, replace(GREEDY, beams=beams))
        assert {(len(answer.token_ids), answer.finish_reason) for answer in answers} == {(11, "length")}


def test_the_first_bart_checkpoints_demand_in_config_json(bart: Any, tmp_path: Path) -> None:
    model, _ = both(bart, tmp_path, {})
    model.generation_config = {}
    model.hf_config.update(force_bos_token_to_be_generated=True, bos_token_id=FIRST, min_length=4)
    answers = generate_text(model, TOKENIZER, TEXTS, GREEDY)
    assert {answer.token_ids[0] for answer in answers} == {FIRST}
    assert min(len(answer.token_ids) for answer in answers) >= 3


def test_answers_end_where_positions_do(bart: Any, tmp_path: Path) -> None:
    model, _ = both(bart, tmp_path, {"min_length": 100})
    (answer,) = generate_text(model, TOKENIZER, ["a" * 23], SamplingParams(temperature=0, max_new_tokens=50))
    assert (len(answer.token_ids), answer.finish_reason) == (24, "length")
    with pytest.raises(DanluError, match="prompt 2: has 25 tokens; the model has positions for 24; shorten it"):
        generate_text(model, TOKENIZER, ["a", "a" * 24], GREEDY)


@pytest.mark.parametrize(
    "demands",
    [{"suppress_tokens": [4]}, {"encoder_no_repeat_ngram_size": 2}, {"num_beam_groups": 2}, {"min_length": "8"},
     {"forced_bos_token_id": LETTERS}, {"forced_eos_token_id": [True]}, {"decoder_start_token_id": -1}],
)  # fmt: skip
def test_demands_that_cannot_be_met_are_refused_by_name(demands: dict[str, Any], t5: Any, tmp_path: Path) -> None:
    model, _ = both(t5, tmp_path, {})
    model.generation_config.update(demands)
    with pytest.raises(DanluError, match=rf"generation_config\.json: {next(iter(demands))} is"):
        generate_text(model, TOKENIZER, TEXTS, GREEDY)


@pytest.mark.parametrize(
    ("texts", "params", "message"),
    [
        ([[5, END], []], GREEDY, "prompt 2: is empty"),
        ([[5, LETTERS]], GREEDY, "outside the model's vocabulary of 29"),
        (["a", "b"], [GREEDY], "there are 2 prompts and 1 sets of parameters"),
        (["a"], SamplingParams(beams=4), "set temperature to 0"),
        (["a"], replace(GREEDY, beams=4, repetition_penalty=2), "leave out repetition_penalty"),
        (["a"], replace(GREEDY, prompt_logprobs=0), "prompt_logprobs: an encoder-decoder"),
        (["a"], SamplingParams(temperature=-1), "temperature"),
    ],
)
def test_mistakes_are_told(texts: Any, params: Any, message: str, t5: Any, tmp_path: Path) -> None:
    model, _ = both(t5, tmp_path, {})
    with pytest.raises(DanluError, match=message):
        generate_text(model, TOKENIZER, texts, params)


def test_no_texts_no_answers(t5: Any, tmp_path: Path) -> None:
    assert generate_text(both(t5, tmp_path, {})[0], TOKENIZER, [], GREEDY) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_repeating_ngrams_are_those_of_transformers(ids: list[int], n: int) -> None:
    barred = NoRepeatNGramLogitsProcessor(n)(torch.tensor([ids]), torch.zeros(1, 4))[0] == -torch.inf
    assert {i for i in range(4) if barred[i]} == set(repeating(ids, n))
