"""LPL: class-level logit perturbation, LPA's published predecessor, as LPA at the logits."""

from lpa_jax.assignment import Assignment, by_confidence
from lpa_jax.perturbations.base import Perturbation, register
from lpa_jax.perturbations.class_level import class_level
from lpa_jax.pgd import PGDOptions
from lpa_jax.registry import described


@register("lpl")
def lpl(
    radius: float = 1.0,
    steps: int = 3,
    *,
    assignment: Assignment | None = None,
    geometry: str = "free",
    step_size: float = 1.5,
    scale: str = "absolute",
    negative_scale: float = 1.0,
) -> Perturbation:
    r"""Learning to Perturb Logits: `lpa` at the injection point `logits`, with LPL's settings.

        z~_i = z_i + delta_{y_i},
        grad J_c = (1/n_c) sum_{y_i = c} (softmax(z_i + delta_c) - t_i)

    for cross entropy. Published LPL constrains only the norm of delta, so there is no half-space
    (`geometry="free"`), and its radius is in units of the logits (`scale="absolute"`). LPL fixes
    the length of a step and derives the number of steps from the bound. Here the number is fixed
    and the length is derived, which reaches the same bound with one compiled program.

    Args:
      radius: eps, in units of the logits, >= 0. 0 is no perturbation, bitwise.
      steps: PGD steps. They cost next to nothing, because no layer is above the logits.
      assignment: Gives every class its sign and multiplier; None is `by_confidence()`.
      geometry: `"free"`, `"signed"` or `"flipped"`.
      step_size: Path length of all steps together, in radii.
      scale: `"absolute"`, or `"relative"` to the mean norm of the logits.
      negative_scale: Factor on the radius of classes with s_c = -1, >= 0.

    Raises:
      ValueError: An option out of range.

    Example:
      >>> lpl(radius=2.0).name
      'lpl'

    References:
      Li et al., AAAI 2022, and arXiv 2209.05668.
    """
    assignment = by_confidence() if assignment is None else assignment
    description = described("lpl", locals())
    return class_level(
        "lpl",
        PGDOptions(steps, step_size, geometry),
        radius=radius,
        assignment=assignment,
        scale=scale,
        negative_scale=negative_scale,
        description=description,
    )
