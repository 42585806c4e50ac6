"""A small run of two processes that may be stopped and go on; prints a digest of its last state.

python tests/reliability_hosts.py COORDINATOR PROCESS FOLDER
"""

import hashlib
import sys
import time

import jax
import reliability_worker as worker

from lpa_jax import array_files, data, trainer
from lpa_jax.checkpoint import Checkpoints, Restored, every_steps
from lpa_jax.interrupts import Interrupts


def main(coordinator, process, folder):
    jax.distributed.initialize(coordinator, 2, int(process))
    program, task = worker.make_program(), worker.make_task()
    batches = data.batches(task.train, 0, worker.BATCH, host_slice=(int(process), 2))
    evaluation = data.evaluation_batches(task.evaluation, 500, host_slice=(int(process), 2))
    checkpoints = Checkpoints(folder, is_writer=process == "0")
    with Interrupts() as interrupts:
        state = program.init(0)
        restored = checkpoints.restore(state) or Restored(0, state, None, {}, ())
        last = None

        def evaluate(state):
            return trainer.evaluate_batches(program.evaluate, state, evaluation, interrupts)

        def paced_stop():
            print("step", flush=True)
            time.sleep(0.05)
            return interrupts()

        for state, record in trainer.train(
            restored.state, program.stages, batches, worker.EPOCHS, evaluate=evaluate,
            totals=restored.totals, should_stop=paced_stop, should_save=every_steps(6),
            save=lambda state, totals: checkpoints.save(int(state.step), state, totals),
        ):  # fmt: skip
            last = state, record
    if last is not None and last[1].epoch == worker.EPOCHS:
        state, record = last
        content = b"".join(v.tobytes() for v in array_files.flatten("state", state).values())
        print(f"finished {hashlib.sha256(content).hexdigest()} {record.evaluation}", flush=True)
    jax.distributed.shutdown()
    return interrupts.exit_status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
