"""LPA: one learned perturbation per class at a hidden layer, expansive or contractive."""

from lpa_jax.assignment import Assignment, by_confidence
from lpa_jax.perturbations.base import Perturbation, register
from lpa_jax.perturbations.class_level import MODES as MODES
from lpa_jax.perturbations.class_level import class_level
from lpa_jax.pgd import PGDOptions


@register("lpa")
def lpa(
    radius: float = 0.1,
    steps: int | None = None,
    *,
    assignment: Assignment | None = None,
    mode: str = "cold",
    geometry: str = "signed",
    shape: str = "full",
    norm: str = "l2",
    step_size: float = 1.5,
    scale: str = "relative",
    negative_scale: float = 1.0,
    min_cosine: float = 0.0,
    radius_target: float | None = None,
    memory_limit: int | None = 2**30,
) -> Perturbation:
    r"""Learning to Perturb Activations: h~_i = h_i + delta_{y_i}, with delta_c learned by PGD.

        delta_c <- Proj_{K_c}( delta_c + s_c eta_c grad J_c / ||grad J_c|| ),
        eta_c    = step_size eps_c / steps,
        K_c      = { delta : ||delta|| <= eps_c, s_c cos(delta, hbar_c) >= min_cosine },
        eps_c    = radius * scale * m_c * (negative_scale if s_c < 0 else 1),

    with J_c the mean loss of class c's members in the global batch, hbar_c their mean activation,
    and (s_c, m_c) from the assignment rule. s_c = +1 raises the loss and the norm (expansive,
    positive augmentation), s_c = -1 lowers the loss and, to first order in delta, the norm
    (contractive, negative augmentation). Lowering the loss pulls the other way, so that with
    min_cosine = 0 delta ends at right angles to hbar_c and lengthens it a little; with min_cosine
    >= ||delta|| / (2 ||hbar_c||) it never does.

    Three modes, by cost above plain training:
      * `"cold"`: `steps` passes above the injection point, from zero, in every training step.
      * `"carry"`: the same from the delta of the class's last appearance; one step suffices. A
        `confidence` assignment costs one forward pass more.
      * `"free"`: no extra pass. The gradient that the training pass leaves at the injection point
        moves delta for the next time; a `confidence` assignment then reads the training pass's
        logits, so under the perturbation.

    Args:
      radius: eps before scaling, >= 0. 0 is no perturbation, bitwise. Tune it per layer: useful
        values differ by orders of magnitude between layers and models.
      steps: PGD steps; None is 3 for `cold` and 1 for `carry` and `free` (which allows no other).
      assignment: which classes, how far; None is `by_confidence()`.
      mode: `"cold"`, `"carry"` or `"free"`.
      geometry: `"signed"`, or `"free"` / `"flipped"` as ablations of the half-space.
      shape: `"full"`, or `"channel"` for one value a channel: a small table for many classes.
      norm: `"l2"` or `"linf"`.
      step_size: path length of all steps together, in radii.
      scale: `"relative"` multiplies the radius by the batch mean of ||h_i|| (of the channel means
        for `shape="channel"`, in the chosen norm); `"absolute"` by 1.
      negative_scale: factor on the radius of classes with s_c = -1, >= 0.
      min_cosine: smallest cosine of s_c delta_c and hbar_c, in [0, 1] (of -s_c delta_c for
        `"flipped"`; 0 for `"free"`, which has no such bound).
      radius_target: loss change in nats, > 0, to which the radius is slowly adapted, by a factor
        for each sign group that starts at 1 (`perturbations/radius_target.py`); for the negative
        one the target, too, is multiplied by `negative_scale`. None keeps the radius. Costs no pass
        with `"cold"` where nothing above is perturbed; `"free"`, and `"carry"` without a
        `confidence` assignment, take one forward pass more.
      memory_limit: bytes that a table may take on every device: that of all C perturbations, which
        `"carry"` and `"free"` keep, or that in which `"cold"` sums gradients, min(C, global batch)
        rows; None for any number.

    Raises:
      ValueError: an option out of range; `steps` other than 1 with `mode="free"`; from
        `TrainState.create`, a kept table larger than `memory_limit`, and from the first step one of
        gradients.

    Source: the abstract of arXiv 2605.29525 fixes class-level perturbation of a hidden layer by
    PGD, expansive or contractive; the rest is this library's choice.

    >>> import jax
    >>> perturbation = lpa(radius=0.1, mode="free")
    >>> state = perturbation.init(jax.ShapeDtypeStruct((32, 8, 8, 16), "float32"), num_classes=10)
    >>> state["delta"].shape
    (10, 8, 8, 16)
    """
    if steps is None:
        steps = 3 if mode == "cold" else 1
    return class_level(
        "lpa",
        PGDOptions(steps, step_size, geometry, norm, shape, min_cosine),
        radius=radius,
        assignment=assignment or by_confidence(),
        mode=mode,
        scale=scale,
        negative_scale=negative_scale,
        radius_target=radius_target,
        memory_limit=memory_limit,
    )
