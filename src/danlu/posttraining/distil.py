"""`danlu distil`: a smaller model that does as a larger one does."""

from __future__ import annotations

from pathlib import Path

from danlu import console
from danlu.config import validate
from danlu.formats.card import Stage
from danlu.hub.pull import with_models
from danlu.posttraining.distil_causal import distil_causal
from danlu.posttraining.distil_classify import distil_classify
from danlu.posttraining.distil_config import DistilConfig


def distil(config: DistilConfig) -> Path:
    """Train a student after a teacher and write its model folder.

    The student is the teacher with fewer layers, a new model of the teacher's family, which begins with the teacher's
    weights cut to its shape, or a model folder with the same tokenizer. It learns from the teacher's probabilities of
    next tokens or labels, and, where that is asked for, from its hidden states and attention maps, or from answers that
    the teacher writes. The card says how large, how good and how fast both are.

    Args:
        config: see :class:`DistilConfig`. Without steps, minutes or epochs the run makes 2 passes over the data; over
            labelled rows 3, and on few of them up to 20.

    Returns:
        The student's model folder.

    Raises:
        Problems: impossible options, all at once.
        DanluError: teacher and student have other tokens or labels, a row cannot be used, or the output folder cannot.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = with_models(validate(config), "teacher")
    inputs = {"teacher": config.teacher, "data": config.data}
    for role in ("student", "heldout", "unlabelled"):
        if (path := getattr(config, role)) is not None:
            inputs[role] = path
    stage = Stage.open(
        config.out, kind="model", verb="distil", config=config, inputs=inputs, overwrite=config.overwrite
    )
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    return distil_causal(config, stage) if config.task == "causal" else distil_classify(config, stage)
