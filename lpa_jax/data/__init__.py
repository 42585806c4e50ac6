"""Data: sources, splits, long tails, batches by step, normalisation, augmentation on the device."""

from lpa_jax.data import augment
from lpa_jax.data.batching import (
    Batches,
    EvaluationBatches,
    batches,
    evaluation_batches,
    grain_batches,
)
from lpa_jax.data.dataset import Dataset
from lpa_jax.data.domain_batching import DomainBatches, domain_batches
from lpa_jax.data.domains import Domains, holdout_split, load_domains
from lpa_jax.data.long_tail import (
    class_sizes,
    load_indices,
    long_tail_indices,
    profile_fractions,
    save_indices,
)
from lpa_jax.data.normalize import Normalization
from lpa_jax.data.sources import EMBEDDED, ImageSource, load, open_source, prepare
from lpa_jax.data.splits import reduced_indices, validation_split

__all__ = [
    "EMBEDDED",
    "Batches",
    "Dataset",
    "DomainBatches",
    "Domains",
    "EvaluationBatches",
    "ImageSource",
    "Normalization",
    "augment",
    "batches",
    "class_sizes",
    "domain_batches",
    "evaluation_batches",
    "grain_batches",
    "holdout_split",
    "load",
    "load_domains",
    "load_indices",
    "long_tail_indices",
    "open_source",
    "prepare",
    "profile_fractions",
    "reduced_indices",
    "save_indices",
    "validation_split",
]
