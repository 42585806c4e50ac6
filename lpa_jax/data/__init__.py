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
from lpa_jax.data.domains import DOMAIN_SETS, Domains, holdout_split, load_domains
from lpa_jax.data.file_crops import FileCrop
from lpa_jax.data.image_files import ImageFiles, open_image_files
from lpa_jax.data.list_files import PUBLISHED, open_published, read_list
from lpa_jax.data.long_tail import (
    class_sizes,
    load_indices,
    long_tail_indices,
    profile_fractions,
    save_indices,
)
from lpa_jax.data.normalize import IMAGENET_NORMALIZATION, Normalization
from lpa_jax.data.prefetch import Prefetched, read_ahead
from lpa_jax.data.sources import (
    EMBEDDED,
    ImageSource,
    damage,
    has_labels,
    in_memory,
    load,
    open_source,
    prepare,
    split_names,
)
from lpa_jax.data.splits import reduced_indices, validation_split

__all__ = [
    "DOMAIN_SETS", "EMBEDDED", "IMAGENET_NORMALIZATION", "PUBLISHED", "Batches", "Dataset",
    "DomainBatches", "Domains", "EvaluationBatches", "FileCrop", "ImageFiles", "ImageSource",
    "Normalization", "Prefetched", "augment", "batches", "class_sizes", "damage",
    "domain_batches", "evaluation_batches", "grain_batches", "has_labels", "holdout_split",
    "in_memory", "load", "load_domains", "load_indices", "long_tail_indices", "open_image_files",
    "open_published", "open_source", "prepare", "profile_fractions", "read_ahead", "read_list",
    "reduced_indices", "save_indices", "split_names", "validation_split",
]  # fmt: skip
