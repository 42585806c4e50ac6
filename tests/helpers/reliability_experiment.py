"""`python -m experiments.long_tail` itself, which says where it is and can be slowed down.

    python -m tests.helpers.reliability_experiment STEP_PACE EVALUATION_PACE --FLAG=VALUE ...

What a real run does in microseconds takes as long as a test needs to strike in it: seconds are
added before every step and before every evaluation batch, of which there are many small ones.
"""

import sys
import time

from absl import flags

from experiments import long_tail
from experiments.images import compare as comparison
from experiments.training import run as runner
from lpa_jax.checkpoints import arrays as array_files
from lpa_jax.training import loop as trainer
from tests.helpers.reliability_worker import announce, announce_steps

EVALUATION_BATCH = 40


def announce_evaluation(pace):
    """Has an evaluation print its begin and its end, and pause before every batch."""
    evaluate_batches = trainer.evaluate_batches

    def paced(evaluate, state, batches, should_stop):
        def asked():
            time.sleep(pace)
            return should_stop()

        return evaluate_batches(evaluate, state, batches, asked)

    trainer.evaluate_batches = paced
    runner._evaluation_batch_size = lambda size: EVALUATION_BATCH
    announce(trainer, "evaluate_batches", "evaluation")


def main(arguments):
    """The experiment's own `main`, in this process."""
    step_pace, evaluation_pace, *experiment_flags = arguments
    announce(comparison.TaskSource, "task", "data")
    announce(array_files, "write", "save")
    announce_evaluation(float(evaluation_pace))
    announce_steps(float(step_pace))
    long_tail.define_flags()
    long_tail.main(flags.FLAGS(["long_tail", *experiment_flags]))


if __name__ == "__main__":
    main(sys.argv[1:])
