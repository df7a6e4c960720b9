"""A tiny random model that compares pairs of texts."""

from __future__ import annotations

from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,你好世界"


def cross_encoder_folder(path: Path, labels: int = 1) -> Path:
    """Write a BERT that classifies pairs of texts; it reads letters."""
    import torch  # here, so that tests of other things start fast
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40, num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(path)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    BertTokenizer.from_pretrained(path).save_pretrained(path)
    return path
