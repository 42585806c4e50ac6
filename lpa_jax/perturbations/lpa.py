"""LPA: one learned perturbation per class at a hidden layer, expansive or contractive."""

from lpa_jax.assignment import Assignment, by_confidence
from lpa_jax.perturbations.base import Perturbation, register
from lpa_jax.perturbations.class_level import MODES as MODES
from lpa_jax.perturbations.class_level import class_level
from lpa_jax.pgd import PGDOptions
from lpa_jax.registry import described


@register("lpa")
def lpa(
    radius: float = 0.03,
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
    probability: float = 1.0,
    examples: float = 1.0,
    memory_limit: int | None = 2**30,
) -> Perturbation:
    r"""Learning to Perturb Activations: h~_i = h_i + delta_{y_i}, with delta_c learned by PGD.

        delta_c <- Proj_{K_c}( delta_c + s_c eta_c grad J_c / ||grad J_c|| ),
        eta_c    = step_size eps_c / steps,
        K_c      = { delta : ||delta|| <= eps_c, s_c cos(delta, hbar_c) >= min_cosine },
        eps_c    = radius * scale * m_c * (negative_scale if s_c < 0 else 1),

    with J_c the mean loss of class c's members in the global batch, hbar_c their mean activation,
    and (s_c, m_c) from the assignment rule. s_c = +1 raises the loss and the norm (expansive,
    positive augmentation); s_c = -1 lowers the loss and, to first order in delta, the norm
    (contractive, negative augmentation). The gradient that lowers the loss usually increases the
    norm. With min_cosine = 0, such a delta is orthogonal to hbar_c and increases its norm slightly;
    with min_cosine >= ||delta|| / (2 ||hbar_c||) it never increases it.

    Three modes, which differ in cost:
      * `"cold"`: Every training step runs `steps` passes above the injection point, from zero.
      * `"carry"`: The same, from the delta of the class's last appearance; one step is enough. A
        `confidence` assignment costs one more forward pass.
      * `"free"`: No extra pass. The gradient of the training pass at the injection point updates
        delta for the class's next appearance. A `confidence` assignment reads the logits of the
        training pass, which are those under the perturbation.

    Args:
      radius: eps before scaling, >= 0. 0 is no perturbation, bitwise. Tune it for every layer:
        useful values differ by orders of magnitude between layers and models. In convolutional
        layers they were 0.01 to 0.03, in MLPs up to 0.1 (`results/radius/default`).
      steps: PGD steps; None is 3 for `cold` and 1 for `carry` and `free` (which allows no other).
      assignment: Gives every class its sign and multiplier; None is `by_confidence()`.
      mode: `"cold"`, `"carry"` or `"free"`.
      geometry: `"signed"`, or `"free"` / `"flipped"` as ablations of the half-space.
      shape: `"full"`, or `"channel"` for one value per channel: a small table for many classes.
      norm: `"l2"` or `"linf"`.
      step_size: Path length of all steps together, in radii.
      scale: `"relative"` multiplies the radius by the batch mean of ||h_i|| (of the channel means
        for `shape="channel"`, in the chosen norm); `"absolute"` by 1.
      negative_scale: Factor on the radius of classes with s_c = -1, >= 0.
      min_cosine: Smallest cosine of s_c delta_c and hbar_c, in [0, 1] (of -s_c delta_c for
        `"flipped"`; 0 for `"free"`, which has no such bound).
      radius_target: Loss change in nats, > 0. One factor per sign group, which starts at 1, slowly
        adapts the radius until the perturbation causes this change; the negative group's target is
        multiplied by `negative_scale`. See `lpa_jax.perturbations.radius_target`. None keeps the
        radius. It costs no pass with `"cold"` if nothing above is perturbed; `"free"`, and
        `"carry"` without a `confidence` assignment, run one more forward pass.
      probability: Of an example to be perturbed, in (0, 1]; drawn anew in each step. All examples
        of a class share delta, which all of them learn. Below 1, the label cannot be read from
        the perturbation of every example, which is why contraction otherwise fails at radii where
        expansion helps.
      examples: Share of a device's batch on which the passes of PGD run, in (0, 1]: the first
        example of every class, then the second of every class, and so on, so that rare classes
        are whole. All examples of a class get its delta. Class means and the scale are those of
        the whole batch, the confidence is that of the part. A class without an example in the
        part is not perturbed. Batch norms above the layer normalise the part by its own
        statistics, and dropout masks are not those of the training pass. Below 1 it needs
        `"cold"` and one label an example.
      memory_limit: Largest table in bytes on a device: `"carry"` and `"free"` keep one of all C
        perturbations, `"cold"` sums gradients in one of min(C, global batch) rows. None for no
        limit.

    Raises:
      ValueError: An option out of range, or `steps` other than 1 with `mode="free"`. A table larger
        than `memory_limit` is refused by `TrainState.create` or, with `"cold"`, by the first step.

    Example:
      >>> import jax
      >>> perturbation = lpa(radius=0.1, mode="free")
      >>> state = perturbation.init(jax.ShapeDtypeStruct((32, 8, 8, 16), "float32"), num_classes=10)
      >>> state["delta"].shape
      (10, 8, 8, 16)

    References:
      The abstract of arXiv 2605.29525 fixes class-level perturbation of a hidden layer by
      PGD, expansive or contractive; the rest is this library's choice.
    """
    if steps is None:
        steps = 3 if mode == "cold" else 1
    assignment = by_confidence() if assignment is None else assignment
    description = described("lpa", locals())
    return class_level(
        "lpa",
        PGDOptions(steps, step_size, geometry, norm, shape, min_cosine),
        radius=radius,
        assignment=assignment,
        mode=mode,
        scale=scale,
        negative_scale=negative_scale,
        radius_target=radius_target,
        probability=probability,
        examples=examples,
        memory_limit=memory_limit,
        description=description,
    )
