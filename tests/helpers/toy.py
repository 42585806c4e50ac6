"""Tiny problems for the tests of steps, injection and devices: they cost little but compilation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax.models import base, layers
from lpa_jax.perturbations import Applied, Perturbation

CLASSES = 4
IMAGE = (2, 2, 1)
LABELS = np.array([0, 1, 1, 2, 0, 1], np.int32)  # class 3 is absent
SIGN = [1.0, -1.0, 1.0, -1.0]
MULTIPLIER = [1.0, 0.5, 0.8, 2.0]
MOMENTUM = 0.9


def batch(labels=LABELS, seed=0):
    """Images whose mean depends on their class."""
    labels = np.asarray(labels, np.int32)
    noise = np.random.default_rng(seed).normal(size=(labels.size, *IMAGE))
    centres = np.random.default_rng(99).normal(size=(CLASSES, *IMAGE))
    return {"image": (centres[labels] + noise).astype(np.float32), "label": labels}


class NormalizedMLP(base.StagedModel):
    """Two hidden layers dropout(relu(BatchNorm(W h + b))) and a linear head."""

    dropout: float = 0.0
    axis_name: str | None = None

    @property
    def stage_names(self):
        return ("hidden1", "hidden2", "logits")

    def setup(self):
        def hidden(features, name):
            return NormalizedLayer(features, self.dropout, self.axis_name, name=name)

        head = layers.Head(self.num_classes, self.dtype, name="logits")
        self.stages = {
            "hidden1": hidden(8, "hidden1"),
            "hidden2": hidden(6, "hidden2"),
            "logits": head,
        }


class NormalizedLayer(nn.Module):
    """dropout(relu(BatchNorm(W h + b))), which counts its training passes in a whole number."""

    features: int
    dropout: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        passes = self.variable("counters", "passes", lambda: jnp.zeros((), jnp.int32))
        if train:
            passes.value += 1
        x = nn.Dense(self.features, name="dense")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(
            use_running_average=not train, momentum=MOMENTUM, axis_name=self.axis_name, name="norm"
        )(x)
        return layers.dropout(nn.relu(x), self.dropout, train)


def recording(perturbation):
    """The perturbation, which keeps what it saw in its state; over devices, in global order."""

    learns = perturbation.update is not None

    def init(activation, num_classes):
        like_activation = jnp.zeros(activation.shape, activation.dtype)
        like_logits = jnp.zeros((activation.shape[0], num_classes))
        gradient = {"gradient": like_activation} if learns else {}
        return {
            **gradient,
            "inner": perturbation.init(activation, num_classes),
            "before": like_activation,
            "after": like_activation,
            "targets": like_logits,
            "decoded": like_logits,
        }

    def apply(state, site):
        applied = perturbation.apply(state["inner"], site)
        seen = {
            "before": site.activation,
            "after": applied.activation,
            "targets": applied.targets,
            "decoded": site.decode(applied.activation),
        }
        if site.axis_name is not None:
            seen = jax.lax.all_gather(seen, site.axis_name, tiled=True)
        seen = jax.lax.stop_gradient(seen)
        new_state = {**state, "inner": applied.state, **seen}
        return Applied(applied.activation, applied.targets, new_state, applied.aux)

    def update(state, site, feedback):
        inner = perturbation.update(state["inner"], site, feedback)
        return {**state, "inner": inner, "gradient": feedback.gradient}

    return Perturbation(perturbation.name, init, apply, update if learns else None)


def site_key():
    """No perturbation; its state is the key that the step hands it (of every device)."""

    def init(activation, num_classes):
        return jnp.zeros_like(jax.random.key_data(jax.random.key(0)))

    def apply(state, site):
        data = jax.random.key_data(site.rng)
        if site.axis_name is not None:
            data = jax.lax.all_gather(data, site.axis_name)
        return Applied(site.activation, site.targets, data, {})

    return Perturbation("site_key", init, apply)


def assert_batches_equal(a, b, name=""):
    assert a.keys() == b.keys(), name
    for key in a:
        assert a[key].dtype == b[key].dtype, (name, key)
        np.testing.assert_array_equal(a[key], b[key], err_msg=f"{name} {key}")


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
