"""Compiles an experiment for TPUs that are not there: python -m launch.compile --config=experiments/imagenet256.py --topology=v5p:8x8x8.

Needs pip install -e '.[tpu]', and no TPU. Tells whether the step fits (exit status 2 where not), what a chip computes, keeps and sends,
and what bounds it.
"""

import os
import re

from absl import flags

from . import program

flags.DEFINE_string("topology", None, "Such as v5p:8x8x8, v5e:16x16, v6e:16x16, v4:4x4x4, tpu7x:4x4x4; cpu:8 and local are this machine.")
flags.DEFINE_enum("program", "train", ["train", "sample"], "What to compile: the training step or the sampler.")
flags.DEFINE_string("json", None, "A file for the report as JSON.")
flags.mark_flag_as_required("topology")


def main():
    import json

    import jax

    topology = program.FLAGS.topology
    if topology != "local":
        jax.config.update("jax_platforms", "cpu")
    simulated = re.fullmatch(r"cpu:([1-9]\d*)", topology)
    if simulated and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", int(simulated[1]))

    from ntm_jax import files
    from ntm_jax.runtime import compile, config

    report = compile.compile_for(config.read(program.FLAGS.config), topology, program.FLAGS.program)
    print(compile.table(report), flush=True)
    if program.FLAGS.json:
        files.write(program.FLAGS.json, json.dumps(report, indent=2) + "\n")
    compile.check_fits(report)


if __name__ == "__main__":
    program.define_config()
    program.run(main)
