"""danlu: one package for the whole life of a language model.

Every verb of the command line is a function here, with a config dataclass of its own::

    from danlu import PretrainConfig, pretrain

    model = pretrain(PretrainConfig(data="data", tokenizer="tok", out="model", minutes=3))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danlu.errors import DanluError
from danlu.verbs import VERBS

__version__ = "0.1.0"

_LAZY = {path.partition(":")[2]: path for verb in VERBS for path in (verb.config, verb.run)}

__all__ = ["DanluError", "__version__", *sorted(_LAZY)]

if TYPE_CHECKING:  # what __getattr__ below hands out, spelled out for type checkers and editors
    from danlu.adapters.diff import adapters_diff as adapters_diff
    from danlu.adapters.merge_verb import merge_adapter as merge_adapter
    from danlu.adapters.verbs_config import AdaptersDiffConfig as AdaptersDiffConfig
    from danlu.adapters.verbs_config import MergeConfig as MergeConfig
    from danlu.data.build import build_data as build_data
    from danlu.data.config import DataConfig as DataConfig
    from danlu.data.mining import MineConfig as MineConfig
    from danlu.data.mining import mine_instructions as mine_instructions
    from danlu.data.puzzles import PuzzlesConfig as PuzzlesConfig
    from danlu.data.puzzles import make_puzzles as make_puzzles
    from danlu.engine.classify_config import ClassifyConfig as ClassifyConfig
    from danlu.engine.classify_verb import classify as classify
    from danlu.engine.verbs import chat as chat
    from danlu.engine.verbs import generate as generate
    from danlu.engine.verbs_config import ChatConfig as ChatConfig
    from danlu.engine.verbs_config import GenerateConfig as GenerateConfig
    from danlu.evaluation.config import EvaluateConfig as EvaluateConfig
    from danlu.evaluation.evaluate import evaluate as evaluate
    from danlu.formats.config import InspectConfig as InspectConfig
    from danlu.formats.inspect import inspect as inspect
    from danlu.hub.config import PullConfig as PullConfig
    from danlu.hub.pull import pull as pull
    from danlu.kernels.doctor import DoctorConfig as DoctorConfig
    from danlu.kernels.doctor import doctor as doctor
    from danlu.models.convert import convert as convert
    from danlu.models.convert_config import ConvertConfig as ConvertConfig
    from danlu.planning.config import NumbersConfig as NumbersConfig
    from danlu.planning.config import PlanConfig as PlanConfig
    from danlu.planning.numbers import numbers as numbers
    from danlu.planning.plan import plan as plan
    from danlu.posttraining.align import align as align
    from danlu.posttraining.config import AlignConfig as AlignConfig
    from danlu.posttraining.config import RewardConfig as RewardConfig
    from danlu.posttraining.distil import distil as distil
    from danlu.posttraining.distil_config import DistilConfig as DistilConfig
    from danlu.posttraining.reward import reward as reward
    from danlu.posttraining.synth.config import SynthConfig as SynthConfig
    from danlu.posttraining.synth.synth import synth as synth
    from danlu.recipe.config import QuickstartConfig as QuickstartConfig
    from danlu.recipe.config import RunConfig as RunConfig
    from danlu.recipe.quickstart import quickstart as quickstart
    from danlu.recipe.run import run_recipe as run_recipe
    from danlu.report.build import build_report as build_report
    from danlu.report.config import ReportConfig as ReportConfig
    from danlu.report.config import ShowConfig as ShowConfig
    from danlu.report.show import show as show
    from danlu.server.access.keys_config import CreateKeyConfig as CreateKeyConfig
    from danlu.server.access.keys_config import KeysUsageConfig as KeysUsageConfig
    from danlu.server.access.keys_config import ListKeysConfig as ListKeysConfig
    from danlu.server.access.keys_config import RevokeKeyConfig as RevokeKeyConfig
    from danlu.server.access.keys_verbs import create_key as create_key
    from danlu.server.access.keys_verbs import keys_usage as keys_usage
    from danlu.server.access.keys_verbs import list_keys as list_keys
    from danlu.server.access.keys_verbs import revoke_key as revoke_key
    from danlu.server.config import ServeConfig as ServeConfig
    from danlu.server.serve import serve as serve
    from danlu.tokenizer.config import TokenizerConfig as TokenizerConfig
    from danlu.tokenizer.train import train_tokenizer as train_tokenizer
    from danlu.training.config import FinetuneConfig as FinetuneConfig
    from danlu.training.config import PretrainConfig as PretrainConfig
    from danlu.training.finetune import finetune as finetune
    from danlu.training.pretrain import pretrain as pretrain


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from danlu.verbs import _resolve

        return _resolve(_LAZY[name])
    raise AttributeError(f"module 'danlu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
