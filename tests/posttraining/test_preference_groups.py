"""What becomes of judged answers: their tokens and targets, and batches that keep groups whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from preference_rows import pairs, write

from danlu.errors import DanluError
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.preferences import GroupStream, Judged, batch_of, encode_answer, read_groups
from danlu.tokenizer.tokenizer import Tokenizer

USER = [{"role": "user", "content": "x?"}]
ANSWER = [{"role": "assistant", "content": "y"}]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def with_config(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    return Tokenizer(copy.deepcopy(dict(tokenizer.definition)), {**tokenizer.config, **changes})


def test_the_answer_and_its_end_are_targets_and_nothing_follows(tokenizer: Tokenizer) -> None:
    ids, mask = encode_answer(tokenizer, USER, ANSWER)
    prompt = tokenizer.encode_chat(USER, add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :]) == "y<|im_end|>"


def test_the_end_keeps_its_label_where_it_also_pads(tokenizer: Tokenizer) -> None:
    alike = with_config(tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>")
    assert alike.pad_id == alike.eos_id
    ids, mask = encode_answer(alike, USER, ANSWER)
    assert ids[-1] == alike.eos_id
    assert mask[-1]
    packed = batch_of(judged_of(alike, [(ids, mask)]).train, alike.pad_id).packed
    assert packed.targets.flatten()[packed.slots_n].tolist()[-1] == alike.eos_id


def judged_of(tokenizer: Tokenizer, examples: list[Any]) -> Judged:
    from danlu.posttraining.preferences import Group

    return Judged([Group(tuple(examples), (), True, None, "here")], [])


def test_there_is_one_bos_and_an_end_also_where_the_template_has_none(tokenizer: Tokenizer) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    plain = with_config(tokenizer, chat_template=template)
    ids, mask = encode_answer(plain, USER, ANSWER)
    assert ids.count(plain.bos_id) == 1 + (plain.eos_id == plain.bos_id)
    assert ids[0] == plain.bos_id
    assert ids[-1] == plain.eos_id
    assert mask[-1]
    text_ids, text_mask = encode_answer(plain, "x is", " y")
    assert text_ids == [plain.bos_id, *plain.encode("x is y"), plain.eos_id]
    assert sum(text_mask) == len(plain.encode(" y")) + 1


def test_turns_of_others_within_an_answer_are_no_targets(tokenizer: Tokenizer) -> None:
    ids, mask = encode_answer(tokenizer, USER, [*ANSWER, {"role": "user", "content": "why?"}, *ANSWER])
    said = tokenizer.decode([i for i, wanted in zip(ids, mask, strict=True) if wanted])
    assert said == "y<|im_end|>y<|im_end|>"
    assert mask[-1]


def test_a_prompt_whose_tokens_are_no_prefix_is_refused(tokenizer: Tokenizer) -> None:
    word = next(w for i in range(256, 320) if len(w := tokenizer.decode([i])) > 2 and tokenizer.encode(w) == [i])
    with pytest.raises(DanluError, match="not a prefix"):
        encode_answer(tokenizer, word[:1], word[1:])
    rewriting = (
        "{% for m in messages %}{{ m.content | upper if loop.last and not add_generation_prompt else m.content }}"
    )
    with pytest.raises(DanluError, match="not a prefix"):
        encode_answer(
            with_config(tokenizer, chat_template=rewriting + "{% endfor %}a"), USER, [{**ANSWER[0], "content": "y"}]
        )


def config(model: Path, data: Path, **changes: Any) -> AlignConfig:
    return AlignConfig(model=model, data=data, out=data.parent / "out", **changes)


def test_rankings_become_pairs_or_stay_whole_or_fall_apart(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{i}", "answers": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 3]} for i in range(6)]
    made = config(model_folder, write(tmp_path / "rows.jsonl", rows), heldout_share=0.0)
    ranked = read_groups(made, tokenizer, "rankings").train
    assert [len(group.examples) for group in ranked] == [4] * 6
    assert ranked[0].ranks == (0, 1, 1, 2)
    assert len(read_groups(made, tokenizer, "pairs").train) == 6 * 5  # b and c are not compared
    singles = read_groups(made, tokenizer, "singles").train
    assert [group.desirable for group in singles] == [True, False, False, False] * 6


def test_long_rows_are_left_out_and_counted(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*pairs(10), {"prompt": "word " * 200, "chosen": "a", "rejected": "b"}]
    made = config(model_folder, write(tmp_path / "rows.jsonl", rows), heldout_share=0.0, seq_len=128)
    assert len(read_groups(made, tokenizer, "pairs").train) == 10
    assert "1 of 11 rows are longer than seq_len (128 tokens)" in " ".join(capsys.readouterr().err.split())
    short = config(model_folder, made.data, seq_len=8)
    with pytest.raises(DanluError, match="no row is left"):
        read_groups(short, tokenizer, "pairs")


def test_rows_without_a_comparison_are_for_kto(model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "a", "label": i % 2 == 0} for i in range(6)]
    made = config(model_folder, write(tmp_path / "rows.jsonl", rows), heldout_share=0.0)
    assert len(read_groups(made, tokenizer, "singles").train) == 6
    with pytest.raises(DanluError, match=r"rows\.jsonl:1: .*--loss kto"):
        read_groups(made, tokenizer, "pairs")


def test_answers_that_the_template_makes_alike_are_refused(
    model_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a  "}])
    with pytest.raises(DanluError, match=r"rows\.jsonl:1: two answers are the same"):
        read_groups(config(model_folder, data), tokenizer, "pairs")


def test_streams_resume_and_batches_keep_groups_whole(model_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = config(model_folder, write(tmp_path / "rows.jsonl", pairs(23)), heldout_share=0.0)
    groups = read_groups(made, tokenizer, "pairs").train
    stream = GroupStream(groups, seed=3, pad_id=tokenizer.pad_id)
    drawn = [stream.next(5) for _ in range(4)]
    state = stream.state()
    rest = [list(stream.next(5).numbers) for _ in range(8)]
    again = GroupStream(groups, seed=3, pad_id=tokenizer.pad_id)
    again.restore(state)
    assert [list(again.next(5).numbers) for _ in range(8)] == rest
    numbers = [n for batch in drawn for n in batch.numbers] + [n for batch in rest for n in batch]
    assert sorted(numbers[:23]) == sorted(numbers[23:46]) == list(range(23))
    assert numbers[:23] != numbers[23:46]
    for batch in drawn:
        assert all(part.n_tokens <= batch.room for part in batch.split(1))
        parts = list(batch.split(2))
        assert [n for part in parts for n in part.numbers] == list(batch.numbers)
        assert all(part.n_tokens <= 2 * batch.room and part.step is batch for part in parts)
        assert sum(part.n_targets for part in parts) == batch.n_targets == 5
        real = batch.packed.segments >= 0
        assert batch.n_tokens == int(real.sum()) < sum(group.n_tokens for group in batch.groups)
