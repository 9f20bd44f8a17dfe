"""Compiles an experiment for TPUs or NVIDIA GPUs, on a machine without any.

    python -m launch.compile --config=experiments/imagenet256.py --topology=v5p:8x8x8
    python -m launch.compile --config=experiments/imagenet256.py --topology=h100:8x1x8 \\
      --config.mesh.slices=8 --config.mesh.fsdp=8

Reports whether the program fits in memory, what each chip computes, stores and sends, and which of
these limits its speed. With --vary=SETTING:VALUE,VALUE,... it compares several values of a setting.
The exit status is 2 if it does not fit. Needs pip install -e '.[tpu]', or
'.[cuda13-compile]' for GPUs.
"""

import os
import re

from absl import flags

from . import program

flags.DEFINE_string(
    "topology", None, "TPU version and grid, such as v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16 or "
    "tpu7x:4x4x4; GPU and NVLink domains x hosts in a domain x GPUs in a host, such as h100:8x1x8, "
    "h200:8x1x8 or b200:8x1x8; cpu:8 for 8 simulated devices, local for this machine's.",
    required=True)
flags.DEFINE_enum(
    "program", "train", ["train", "sample", "decode", "evaluate", "rollout"], "Compiles the "
    "training step; the sampler; the decoding of its latents by config.sample.autoencoder; the "
    "held-out likelihood; or, of post-training, the samples of a batch and their comparison with "
    "the reference.")
flags.DEFINE_string(
    "vary", None, "SETTING:VALUE,VALUE,...; compiles the program at each value, such as "
    "model.remat:none,dots,narrow,full, and prints a table.")
flags.DEFINE_string(
    "dump", None, "A folder to write the program's text to, before and after compilation; without "
    "--vary.")
flags.DEFINE_string("json", None, "A file to write the report to, as JSON.")


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
    from ntm_jax.tools.pods import compile, report
    from ntm_jax.tools.pods.memory import check_fits

    f, found = program.FLAGS, []
    if f.vary:
        found = compile.vary(f.config.to_dict(), f.vary, topology, f.program)
        print(report.comparison(found), flush=True)
    else:
        found = [compile.compile_for(program.read_config(), topology, f.program, f.dump)]
        print(report.table(found[0]), flush=True)
    if f.json:
        files.write(f.json, json.dumps(found if f.vary else found[0], indent=2) + "\n")
    if not f.vary:
        check_fits(found[0])


if __name__ == "__main__":
    program.define_config()
    program.run(main)
