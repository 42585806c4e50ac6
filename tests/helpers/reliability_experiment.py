"""`python -m experiments.long_tail` itself, which says where it is and can be slowed down.

    python -m tests.helpers.reliability_experiment STEP_PACE EVALUATION_PACE --FLAG=VALUE ...

What a real run does in microseconds takes as long as a test needs to strike in it: seconds are
added before every step and before every evaluation batch, of which there are many small ones.
"""

import sys
import time

from absl import flags

from experiments import long_tail
from experiments.images import data as image_data
from experiments.training import run as runner
from lpa_jax.checkpoints import arrays as array_files
from tests.helpers.reliability_worker import announce, announce_steps

EVALUATION_BATCH = 40


def announce_evaluation(pace):
    """Has an evaluation print its begin and its end, and pause before every batch."""
    evaluate = runner.evaluate

    def paced(job, state, evaluated, should_stop):
        def asked():
            time.sleep(pace)
            return should_stop()

        return evaluate(job, state, evaluated, asked)

    runner.evaluate = paced
    image_data.LARGEST_EVALUATION_BATCH = EVALUATION_BATCH
    announce(runner, "evaluate", "evaluation")


def main(arguments):
    """The experiment's own `main`, in this process."""
    step_pace, evaluation_pace, *experiment_flags = arguments
    announce(image_data.TaskSource, "task", "data")
    announce(array_files, "write", "save")
    announce_evaluation(float(evaluation_pace))
    announce_steps(float(step_pace))
    long_tail.define_flags()
    long_tail.main(flags.FLAGS(["long_tail", *experiment_flags]))


if __name__ == "__main__":
    main(sys.argv[1:])
