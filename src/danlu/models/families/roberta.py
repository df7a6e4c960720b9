"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2019, arXiv:1911.02116): BERT trained
longer, on more text or more languages. Positions count real tokens only and start behind the padding id, so that the
table has that many rows more than there are positions; one token type, or a few that are not used; classifiers bring a
pooler of their own."""

from __future__ import annotations

import dataclasses

from danlu.models.families import bert
from danlu.models.family import ClassifierShape, Family
from danlu.models.hf_config import HFConfig
from danlu.models.names import ByTying, Names
from danlu.nn.config import ModelConfig

MASKED_LM: Names = {
    "transform.weight": "lm_head.dense.weight",
    "transform.bias": "lm_head.dense.bias",
    "transform_norm.weight": "lm_head.layer_norm.weight",
    "transform_norm.bias": "lm_head.layer_norm.bias",
    "head.weight": "lm_head.decoder.weight",
    "head.bias": ByTying("lm_head.bias", "lm_head.decoder.bias"),
}
POOLED_CLASSIFIER: Names = {
    "pooler.weight": "classifier.dense.weight",
    "pooler.bias": "classifier.dense.bias",
    "head.weight": "classifier.out_proj.weight",
    "head.bias": "classifier.out_proj.bias",
}


def read(hf: HFConfig) -> ModelConfig:
    """Shape from `config.json`."""
    rows = hf.integer("max_position_embeddings", 512)
    offset = hf.integer("pad_token_id", 1, least=0) + 1
    if rows <= offset:
        raise hf.error(f"max_position_embeddings is {rows}; positions start at {offset}, behind pad_token_id")
    return dataclasses.replace(
        bert.read(hf), context=rows - offset, position_offset=offset, count_padding=False, transform_activation="gelu"
    )


FAMILY = Family(
    model_type="roberta",
    architectures={
        "RobertaForMaskedLM": "masked_lm",
        "RobertaForSequenceClassification": "sequence_classification",
        "RobertaForTokenClassification": "token_classification",
        "RobertaForQuestionAnswering": "question_answering",
        "RobertaModel": "embedding",
    },
    read=read,
    names=bert.NAMES,
    prefix="roberta.",
    heads={
        "masked_lm": MASKED_LM,
        "sequence_classification": POOLED_CLASSIFIER,
        "token_classification": bert.CLASSIFIER,
        "question_answering": bert.SPANS,
    },
    classifier=ClassifierShape(pool="first", pooler="tanh", bias=True),
    ignored=("*embeddings.position_ids", "*pooler.dense.*", "lm_head.bias", "lm_head.decoder.bias"),
    harmless=("output_past",),
)
XLM_ROBERTA = dataclasses.replace(
    FAMILY,
    model_type="xlm-roberta",
    architectures={f"XLM{name}": task for name, task in FAMILY.architectures.items()},
)
