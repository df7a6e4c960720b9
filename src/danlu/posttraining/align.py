"""`danlu align`: a model learns to answer as people prefer."""

from __future__ import annotations

from pathlib import Path

from danlu.config import validate
from danlu.hub.pull import with_models
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.dpo import learn_preferences
from danlu.posttraining.policy import learn_policy

METHODS = {"dpo": learn_preferences, "grpo": learn_policy, "ppo": learn_policy}


def align(config: AlignConfig) -> Path:
    """Align a model folder and write a new model folder, by the method that the config names.

    Returns:
        The new model folder, or, where an adapter was trained, a folder in PEFT's layout.

    Raises:
        Problems: impossible options, all at once.
        DanluError: data, models or an output folder that cannot be used; see the methods.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = with_models(validate(config), "model", "reference", "critic")
    return METHODS[config.method](config)
