"""`danlu finetune --task seq2seq`: translations, summaries, answers, with an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu import console
from danlu.data.labelled import Columns, PairRow, pair_rows, read_split
from danlu.data.padded import Example, PaddedBatch, batches_by_length
from danlu.engine.config import SamplingParams
from danlu.engine.generate import generate_text
from danlu.errors import DanluError
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model
from danlu.nn.config import ModelConfig
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import FinetuneConfig
from danlu.training.task import Report, Task


def prepare_seq2seq(config: FinetuneConfig, tokenizer: Tokenizer) -> Task:
    """Read the pairs and open the model. The decoder is given the target behind its start token; the loss falls on
    the target's tokens and on its end.

    Raises:
        DanluError: a row that cannot be used, no target that fits, or a model that is no encoder-decoder.
    """
    columns = Columns(config.text_column, "", config.label_column)
    share = 0.1 if config.heldout_share is None else config.heldout_share
    train_rows, held_out_rows = read_split(
        pair_rows, config.data, config.heldout, columns, share=share, on_error=config.on_error
    )
    model = load_model(config.model, EncoderDecoder)
    encode = _Encoder(
        tokenizer,
        model.config.decoder_start_id,
        _room(config.seq_len, model.config.encoder),
        _room(config.target_len, model.config.decoder),
    )
    train, held_out = encode.side(train_rows), encode.side(held_out_rows)
    encode.warn(config, len(train_rows) + len(held_out_rows))
    if not train[1]:
        raise DanluError(f"{config.data}: no row is left to train on; raise target_len (now {config.target_len})")

    def loss_sum(batch: PaddedBatch) -> Tensor:
        return next_token_nll_sum(_logits(model, batch), batch.targets)

    def report() -> Report:
        return _report(model, tokenizer, config, *held_out)

    return Task(model, train[1], held_out[1], loss_sum, report)


def _room(wanted: int, stack: ModelConfig) -> int:
    """Only learned positions end; relative ones go on."""
    return min(wanted, stack.context) if stack.learned_positions else wanted


def _logits(model: EncoderDecoder, batch: PaddedBatch) -> Tensor:
    return model(  # type: ignore[no-any-return]
        batch.ids, batch.decoder_ids, real_bs=batch.real, decoder_real_bt=batch.decoder_real
    )


@dataclass
class _Encoder:
    """Pairs to examples; counts what was cut and what was left out."""

    tokenizer: Tokenizer
    start_id: int
    source_len: int
    target_len: int
    n_cut: int = 0
    n_too_long: int = 0

    def side(self, rows: Sequence[PairRow]) -> tuple[list[PairRow], list[Example]]:
        """The rows that can be used, and what they are encoded to."""
        kept, examples = [], []
        for row in rows:
            try:
                source, _ = self.tokenizer.encode_for_encoder(row.source)
                target, _ = self.tokenizer.encode_for_encoder(row.target)
                if len(target) > self.target_len:
                    self.n_too_long += 1
                    continue
                if len(source) > self.source_len:
                    self.n_cut += 1
                    source, _ = self.tokenizer.encode_for_encoder(row.source, max_length=self.source_len)
            except DanluError as error:
                raise DanluError(f"{row.where}: {error}") from error
            if not source or not target:
                raise DanluError(f"{row.where}: source or target has no tokens")
            kept.append(row)
            examples.append(Example(source, target, decoder_ids=[self.start_id, *target[:-1]]))
        return kept, examples

    def warn(self, config: FinetuneConfig, n_rows: int) -> None:
        if self.n_cut:
            console.warn(f"{config.data}: {self.n_cut:,} of {n_rows:,} sources are cut to {self.source_len} tokens")
        if self.n_too_long:
            console.warn(
                f"{config.data}: {self.n_too_long:,} of {n_rows:,} rows have a target of more than {self.target_len} "
                "tokens (target_len) and are left out"
            )


@torch.inference_mode()
def _report(
    model: EncoderDecoder, tokenizer: Tokenizer, config: FinetuneConfig, rows: list[PairRow], examples: list[Example]
) -> Report:
    """Loss and accuracy of each next token given the true ones before it; and how many answers are right as a whole."""
    nll = torch.zeros((), dtype=torch.float64)
    hits = n_targets = 0
    for _, batch in batches_by_length(examples, 16, tokenizer.pad_id):
        here = batch.to(model.device)
        logits = _logits(model, here)
        nll += next_token_nll_sum(logits, here.targets).double().cpu()
        hits += int((logits.argmax(dim=-1) == here.targets).sum())
        n_targets += batch.n_targets
    scores = {"loss": nll.item() / n_targets, "token_accuracy": hits / n_targets}
    asked, sources = rows[: config.heldout_answers], [e.ids for e in examples[: config.heldout_answers]]
    samples = []
    copied = 0.0
    if asked:
        params = SamplingParams(temperature=0, max_new_tokens=config.target_len)
        with console.progress("answering held-out rows", len(asked), "rows") as advance:
            answers = generate_text(model, tokenizer, sources, params, progress=advance)
        right = [answer.text.strip() == row.target.strip() for answer, row in zip(answers, asked, strict=True)]
        scores["exact_match"] = sum(right) / len(asked)
        copied = sum(row.source.strip() == row.target.strip() for row in asked) / len(asked)
        samples = [
            {"where": row.where, "source": row.source[:300], "target": row.target[:300], "answer": answer.text[:300]}
            for row, answer in list(zip(asked, answers, strict=True))[:20]
        ]
    compared = {"this model": scores, "the source as it is": {"exact_match": copied}}
    metrics = {f"heldout_{name}": value for name, value in scores.items()} | {"heldout_answers": len(asked)}
    return Report(metrics, compared if asked else {"this model": scores}, {}, {"samples": samples})
