"""Reading a `config.json`: every field is honoured or refused, none is ignored in silence."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from danlu.errors import DanluError
from danlu.nn.config import Activation, Rope, RopeScaling

REQUIRED: Any = object()

# Fields that do not change what a model computes: where it came from, how it was trained, what a generator does with
# its output. Generation settings that older configs hold are read from generation_config.json.
HARMLESS_FIELDS = (
    "architectures model_type _name_or_path name_or_path transformers_version auto_map dtype torch_dtype "
    "use_cache initializer_range initializer_factor init_std _attn_implementation_autoset attn_implementation "
    "_attn_implementation id2label label2id num_labels problem_type return_dict output_hidden_states "
    "output_attentions pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id "
    "unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id begin_suppress_tokens "
    "suppress_tokens bad_words_ids bias_token_id boi_token_index eoi_token_index finetuning_task "
    "task_specific_params tokenizer_class prefix max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate "
    "remove_invalid_values exponential_decay_length_penalty torchscript use_bfloat16 tf_legacy_loss pruned_heads "
    "gradient_checkpointing pretraining_tp slow_but_exact unsloth_version unsloth_fixed "
    "keys_to_ignore_at_inference chunk_size_feed_forward sinusoidal_pos_embds classifier_dropout "
    "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop "
    "attn_pdrop summary_first_dropout dropout dropout_rate activation_dropout encoder_layerdrop decoder_layerdrop "
    "seq_classif_dropout qa_dropout embed_dropout router_aux_loss_coef router_jitter_noise output_router_logits "
    "cache_implementation sentence_transformers sbert_ce_default_activation_function "
)
HARMLESS = frozenset(HARMLESS_FIELDS.split())

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


class HFConfig:
    """The content of a `config.json`, and which of its fields have been read.

    Args:
        content: the parsed file.
        where: its path, for messages.
        stored: names of the tensors in the file beside it, for what the fields leave open.
    """

    def __init__(self, content: Mapping[str, Any], where: str, stored: Collection[str] = ()) -> None:
        self.content, self.where = content, where
        self.stored = stored
        self._read: set[str] = set()

    def error(self, message: str) -> DanluError:
        """An error that names the file."""
        return DanluError(f"{self.where}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands; null counts as absent."""
        self._read.add(key)
        value = self.content.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 1) -> Any:
        """A whole number of at least ``least``. Without a default the field is required; a default may be None."""
        value = self.get(key, default)
        if value is REQUIRED:
            raise self.error(f"{key} is missing")
        if value is not default and (
            isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31
        ):
            raise self.error(f"{key} is {value!r}; expected a whole number of at least {least}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number; as :meth:`integer`."""
        value = self.get(key, default)
        if value is REQUIRED:
            raise self.error(f"{key} is missing")
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{key} is {value!r}; expected a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}; expected true or false")
        return value

    def spelling(self, *keys: str) -> str:
        """Which of several names of one field this config uses; the first where it has none.

        Raises:
            DanluError: two of them disagree.
        """
        present = [key for key in keys if self.get(key) is not None]
        if len({repr(self.content[key]) for key in present}) > 1:
            raise self.error(f"{' and '.join(present)} say the same thing differently; keep one of them")
        return present[0] if present else keys[0]

    def activation(self, key: str, default: str) -> Activation:
        """The activation of the feed-forward network."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.error(f"{key} is {value!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        return ACTIVATIONS[value]

    def layers(self, key: str, n_layers: int, meaning: Mapping[Any, bool]) -> tuple[int, ...] | None:
        """The layers that a list of one value per layer marks as true; None where the field is absent."""
        values = self.get(key)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != n_layers:
            raise self.error(f"{key} must list one value for each of the {n_layers} layers")
        for value in values:
            if not isinstance(value, str | int) or value not in meaning:
                raise self.error(f"{key} holds {value!r}; known: {', '.join(map(str, meaning))}")
        return tuple(layer for layer, value in enumerate(values) if meaning[value])

    def only(self, key: str, *values: Any) -> None:
        """Refuse a field whose value is none of those that can be honoured (absent and null always can)."""
        value = self.get(key)
        if value is not None and value not in values:
            expected = " or ".join(map(repr, values)) or "none"
            raise self.error(f"{key} is {value!r}, which is not supported; supported: {expected}")

    def rope(
        self,
        head_dim: int,
        context: int,
        *,
        default_base: float = 10_000.0,
        default_share: float | None = None,
    ) -> Rope:
        """Rotary positions from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

        Args:
            default_base: the base where the config gives none.
            default_share: the share of each head that is turned where the config gives none. None: this family turns
                whole heads, and another share is refused.
        """
        new, old = self.get("rope_parameters"), self.get("rope_scaling")
        parameters = old or new or {}  # where both are, transformers goes by the old one
        if not isinstance(parameters, dict):
            raise self.error(f"the rotary parameters are {parameters!r}; expected an object")
        inner = HFConfig(parameters, f"{self.where}: rotary parameters")
        base = float(inner.number("rope_theta", self.number("rope_theta", default_base)))
        if base <= 0:
            raise self.error(f"rope_theta is {base}; expected a number above 0")
        share = float(inner.number("partial_rotary_factor", self.number("partial_rotary_factor", default_share or 1.0)))
        if default_share is None and share != 1:
            raise self.error("partial_rotary_factor is not supported for this family; its heads are rotated whole")
        dim = int(head_dim * share)
        if dim < 2:
            raise inner.error(f"partial_rotary_factor is {share}, which leaves nothing of a head of {head_dim} to turn")
        rope = Rope(base=base, dim=None if dim == head_dim else dim, scaling=self._scaling(inner, dim, context))
        inner.finish(harmless=("rope_type", "type"))
        return rope

    def _scaling(self, inner: HFConfig, dim: int, context: int) -> RopeScaling | None:
        kind = inner.get("rope_type") or inner.get("type") or "default"
        if kind == "su":  # the first name of LongRoPE
            kind = "longrope"
        # Some configs give the trained length beside the parameters instead of among them; where both are, that counts.
        original, beside = (config.integer("original_max_position_embeddings", None) for config in (inner, self))
        original = beside or original
        if kind == "default":
            return None
        if kind == "longrope":
            short, long = (tuple(float(x) for x in inner.get(f"{length}_factor", ())) for length in ("short", "long"))
            if not len(short) == len(long) == dim // 2:
                raise inner.error(f"short_factor and long_factor must hold {dim // 2} numbers each")
            original = original or context
            factor = float(inner.number("factor", context / original))
            return RopeScaling(
                "longrope", factor, original, attention_factor=inner.number("attention_factor", None),
                short_factors=short, long_factors=long,
            )  # fmt: skip
        factor = float(inner.number("factor")) if kind in ("linear", "dynamic", "yarn", "llama3") else 1.0
        if factor <= 0:
            raise inner.error(f"factor is {factor}; expected a number above 0")
        if kind in ("linear", "dynamic"):
            return RopeScaling("linear" if kind == "linear" else "dynamic", factor)
        if kind == "llama3":
            return RopeScaling(
                "llama3", factor, original or context,
                low_freq_factor=inner.number("low_freq_factor"), high_freq_factor=inner.number("high_freq_factor"),
            )  # fmt: skip
        if kind == "yarn":
            return RopeScaling(
                "yarn", factor, original or context,
                beta_fast=inner.number("beta_fast", 32.0), beta_slow=inner.number("beta_slow", 1.0),
                truncate=inner.flag("truncate", True), attention_factor=inner.number("attention_factor", None),
                mscale=inner.number("mscale", None), mscale_all_dim=inner.number("mscale_all_dim", None),
            )  # fmt: skip
        raise inner.error(
            f"rope_type is {kind!r}, which is not supported; supported: linear, dynamic, yarn, llama3, longrope"
        )

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse fields that nobody has read and that may change what the model computes.

        Args:
            harmless: further fields that do not, in this family.
        """
        known = self._read | HARMLESS | set(harmless)
        unread = sorted(
            key for key, value in self.content.items() if key not in known and value not in (None, False, [], {}, "")
        )
        if unread:
            raise self.error(
                f"{', '.join(unread)}: not known for this family and may change what the model computes; "
                "remove what does not"
            )
