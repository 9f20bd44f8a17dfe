"""A job that only steps together, for tests of how processes meet, stop and die."""

import time

from absl import flags

from launch import program

flags.DEFINE_integer("fails", None, "The number of a process that raises an exception at step 3.")


def main():
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from ntm_jax.runtime.processes import job

    step = 0
    while not job.stop_agreed(step):
        step += 1
        multihost_utils.process_allgather(np.int32(step))
        print(f"step {step}/", flush=True)
        if step == 3 and jax.process_index() == program.FLAGS.fails:
            raise IndexError("this process fails")
        time.sleep(0.05)
    print(f"stopped at step {step}")


if __name__ == "__main__":
    program.define_processes()
    program.run(main)
