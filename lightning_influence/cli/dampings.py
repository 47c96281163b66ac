"""Damping rules as they are written on the command line."""

from __future__ import annotations

from lightning_influence.curvature import (
    AbsoluteDamping,
    Damping,
    DampingOfLayers,
    GlobalDamping,
    HeuristicDamping,
    TrainingDamping,
    WeightDecayDamping,
)

TRAINING = "training"
MULTIPLES: dict[str, type[HeuristicDamping | GlobalDamping | WeightDecayDamping]] = {
    "mean": HeuristicDamping,
    "overall_mean": GlobalDamping,
    "weight_decay": WeightDecayDamping,
}
HELP = (
    "added to each layer's eigenvalues: a number, a multiple of their mean (1*mean), of the mean over all layers "
    "(0.3*overall_mean) or of the weight decay (3*weight_decay), or `training`, by how the layers were trained"
)


def damping_of(text: float | str) -> Damping | DampingOfLayers:
    """The rule of a text.

    Raises:
        ValueError: if it is none.

    Example:
        >>> damping_of("1*mean"), damping_of("0.01"), damping_of("training") == TrainingDamping()
        (HeuristicDamping(factor=1.0), AbsoluteDamping(value=0.01), True)
    """
    if text == TRAINING:
        return TrainingDamping()
    factor, _, of = str(text).replace(" ", "").partition("*")
    try:
        return (MULTIPLES[of] if of else AbsoluteDamping)(float(factor))
    except (KeyError, ValueError) as error:
        raise ValueError(
            "`--damping` must be a positive number, a positive multiple such as 1*mean (of "
            f"{', '.join(MULTIPLES)}) or {TRAINING}, got {text!r}."
        ) from error


def argument_of(damping: Damping | DampingOfLayers) -> str | None:
    """The text of a rule; None if it has none.

    Example:
        >>> argument_of(HeuristicDamping(0.5)), argument_of(TrainingDamping())
        ('0.5*mean', 'training')
    """
    if damping == TrainingDamping():
        return TRAINING
    for name, kind in MULTIPLES.items():
        if type(damping) is kind and damping == kind(damping.factor):
            return f"{damping.factor:g}*{name}"
    return f"{damping.value:g}" if isinstance(damping, AbsoluteDamping) else None
