"""What every program starts with: flags, and the exit status of what goes wrong."""

import contextlib
import dataclasses
import faulthandler
import gc
import glob
import importlib.util
import os
import pathlib
import re
import sys
import time
import traceback
import typing

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not any(map(os.path.exists, ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))):
    # As it loads, the CUDA plugin would log that libraries that run programs are missing. A machine
    # without a GPU has it only to compile for GPUs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

from absl import app, flags, logging
from ml_collections import config_flags

from ntm_jax import files, host_memory
from ntm_jax.errors import MachineFault, UserError
from ntm_jax.runtime import renamed

from . import mistakes

FLAGS = flags.FLAGS
EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"  # also in an installed package
# Characters that change the rest of a terminal, but for those that end a progress bar's line.
_CONTROL = re.compile(
    r"(?<=.)\r(?=.)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", re.DOTALL)
START = f"python -m {__package__}."  # how this program was started, up to its name; see console.py

flags.disclaim_key_flags()  # --help of a program lists the flags defined here for it


class ExperimentParser(config_flags.config_flags.ConfigFileFlagParser):
    """Parses --config: a file, or the name of a shipped experiment, with an optional :variant."""

    def parse(self, path: str):
        name, colon, variant = path.partition(":")
        if re.fullmatch(r"\w*", name):
            file = EXPERIMENTS / f"{name}.py"
            if not file.is_file():
                known = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("[!_]*.py")))
                raise ValueError(f"expected one of {known}, or a file such as my_experiment.py")
            path = f"{file}{colon}{variant}"
        return super().parse(path)


class Scales(flags.ArgumentParser):
    """Parses one guidance scale, or one for each step, separated by commas."""

    def parse(self, given):
        if not isinstance(given, str):  # the default
            return given
        scales = tuple(map(float, given.split(",")))
        return scales[0] if len(scales) == 1 else scales


def define_config(required: bool = True, flag_values: flags.FlagValues = FLAGS):
    """Defines --config, an experiment, and --config.section.key=value for each of its settings."""
    config_flags.DEFINE_config_file(
        "config", None, "An experiment: a name such as digits, or a file, each with an optional "
        ":variant. --config.section.key=value overrides a setting, such as "
        "--config.data.source=folder:PATH, --config.train.steps=4000, --config.data.batch_size=16, "
        "--config.model.width=64, --config.seed=1; --helpfull lists all.",
        flag_values=flag_values, lock_config=True)
    flag_values["config"].parser = ExperimentParser("config")
    if required:
        flags.mark_flag_as_required("config", flag_values)


def read_config(workdir: str = ""):
    """Returns the Config of --config; prints what it leaves open and is chosen for the data."""
    from ntm_jax.runtime import config_file

    return config_file.complete(FLAGS.config, workdir)


def define_run(raw: bool = False):
    """Defines the flags of a trained run, which `load_run` reads; raw: also --raw."""
    flags.DEFINE_string("workdir", None, "A run's folder, an export, or hf://OWNER/NAME.",
                        required=True)
    flags.DEFINE_integer("step", None, "The checkpoint's step; by default the latest, or the best "
                         "of a run with config.train.patience. Figures of another step are "
                         "written to files that have it in their name.")
    if raw:
        flags.DEFINE_bool("raw", False, "The raw parameters in place of their moving average.")


def load_run():
    """Returns the api.Run of --workdir, --step and, where it is defined, --raw."""
    from ntm_jax import api

    return api.load(FLAGS.workdir, FLAGS.step, "raw" in FLAGS and FLAGS.raw)


def define_sampling():
    """Defines the decoder and the guidance of samples."""
    flags.DEFINE_string(
        "decoder", None, "How the last level becomes an image: inverse, score or denoiser; or how "
        "a flow-matching model's ODE is solved: euler or heun. Or one of your own, with --import.")
    flags.DEFINE(
        Scales(), "guidance", None, "Guidance scale w, or one for each step, from pure noise down: "
        "1,0.5,0,0; the configuration's by default.")


def define_selection():
    """Defines how samples are selected among candidates; see api.Run.best_of."""
    flags.DEFINE_integer(
        "candidates", 1, "Samples drawn for each one that is kept: the one that its condition "
        "explains best, by the model's likelihood.", lower_bound=1)
    flags.DEFINE_string(
        "judge", None, "Another run's folder or export, whose likelihood selects among candidates; "
        "the run's own by default.")
    flags.DEFINE_float(
        "stop_nats", None, "Threshold in nats: the first candidate whose information reaches it is "
        "kept; by default all candidates are compared.")


def define_processes():
    """Defines how the processes of a job find each other; TPU hosts need none of these flags."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, for a job of several processes.")
    flags.DEFINE_integer("num_processes", None, "Number of processes in the job.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "join_timeout", 300, "Seconds to wait for all processes to start.", lower_bound=1)
    flags.DEFINE_integer(
        "heartbeat_timeout", 60, "Seconds after which a silent process counts as lost. jax "
        "then aborts the others, with status 134 in a shell.", lower_bound=1)
    flags.DEFINE_string(
        "compilation_cache", None, "Folder that keeps compiled programs for later runs, by default "
        "that of JAX_COMPILATION_CACHE_DIR, or else WORKDIR-programs where several processes train "
        "on accelerators, and ~/.cache/ntm_jax/programs/CORES-cores elsewhere. Empty keeps none.")


def from_flags(kind, **given):
    """A dataclass with the given fields, and the others from the flags of their names."""
    names = {field.name for field in dataclasses.fields(kind)} - {*given}
    return kind(**given, **{name: FLAGS[name].value for name in names})


def asked_step(run) -> int | None:
    """The run's step if --step or --workdir asks for it, None if it is the latest."""
    from ntm_jax.export import hub

    latest = FLAGS.step is None and run.workdir == hub.results_folder(FLAGS.workdir)
    return None if latest else run.step


def _escape_controls(stream):
    """Makes a stream escape what could command a terminal, as names in others' files might.

    It also escapes what its encoding lacks, such as a file's name that is not UTF-8.
    """
    write = stream.write

    def escaped(text: str) -> int:
        if text.strip("\n").replace("\x1b[A", ""):  # else a progress bar returns to its line
            text = _CONTROL.sub(lambda it: it[0].encode("unicode_escape").decode(), text)
        return write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))

    stream.write = escaped


def _error(message: str) -> str:
    """The line for a message, in which programs are named in the form that started this one."""
    return f"error: {' '.join(message.split()).replace('ntm-jax ', START)}"


def fail(message: str) -> typing.NoReturn:
    """Ends the program as a user's mistake."""
    print(_error(message), file=sys.stderr, flush=True)
    sys.exit(2)


def _import_modules(argv):
    """Imports the modules that --import names, before flags and settings are checked."""
    early = flags.FlagValues()
    flags.DEFINE_multi_string("import", [], "", flag_values=early)
    early(argv, known_only=True)
    names = early["import"].value or []
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            fail(f"--import={name} cannot be imported ({error}): expected a module in "
                 f"{os.getcwd()} or of an installed package")


def _settings() -> str:
    """Every setting with its default and its meaning, as --helpfull prints flags."""
    from ntm_jax import typed
    from ntm_jax.runtime import config

    return "\nsettings of --config:\n" + "\n".join(
        f"  --config.{name}: {field.metadata['setting'].documentation} (default: {field.default!r})"
        for name, _, field in typed.settings(config.config_class()))


def _parse(argv):
    argv = [renamed.argument(given) for given in argv]
    sys.argv[1:] = argv[1:]  # where config_flags looks for settings
    _import_modules(argv)
    try:
        rest = FLAGS(argv)
        if "config" in FLAGS and FLAGS.config:
            FLAGS.config.keys()  # config_flags keeps a file that it cannot read for the first use
    except SystemExit as ended:
        if "config" in FLAGS and {"--helpfull", "-helpfull"} & {*argv}:
            print(_settings())
        sys.stdout.flush()
        sys.exit(0 if ended.code == 1 else ended.code)  # absl ends --help and its kind with 1
    except Exception as error:
        fail(mistakes.of_flags(error))
    for name in ("workdir", "out"):
        value = FLAGS[name].value if name in FLAGS else None
        if value == "":
            fail(f"--{name} is empty: give a folder, such as --{name}=runs/digits")
        if isinstance(value, str):
            if re.search("[\ud800-\udfff]", value):  # of bytes that are not UTF-8
                fail(f"--{name}={value!a} is not UTF-8: give a folder whose name is")
            FLAGS[name].value = files.expanded(value)  # one folder for all that is written there
    if len(rest) > 1:
        fail(f"stray argument {rest[1]!r}: every setting is written --name=value, and a switch "
             "--config.flag or --noconfig.flag")
    return rest


def _join():
    """Joins the processes of a job by the flags, or by the environment of a TPU host.

    Does nothing for a single process elsewhere.
    """
    import jax

    names = "coordinator_address", "num_processes", "process_id"
    missing = [name for name in names if FLAGS[name].value is None]
    if len(missing) == len(names) and not _on_tpu():
        return
    faulthandler.disable()  # absl's; where jax aborts, its pages would bury jax's line
    # Two programs that a CPU runs at once may start in another order in another process. Where
    # their collectives wait for each other, the job hangs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Its handler of SIGTERM, in C++, would hide the signal from the program.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id,
            initialization_timeout=FLAGS.join_timeout,
            heartbeat_timeout_seconds=FLAGS.heartbeat_timeout,
            # Under Slurm jax would otherwise give each process one of its node's GPUs.
            cluster_detection_method=None if missing else "deactivate")
    except (RuntimeError, ValueError, IndexError) as error:
        late = isinstance(error, jax.errors.JaxRuntimeError)  # or does not answer
        raise (MachineFault if late else UserError)(
            f"the processes of this job could not connect ({error}): give all of them the same "
            "--coordinator_address=HOST:PORT of process 0 and the same --num_processes, and each "
            "its own --process_id from 0") from None


def _on_tpu() -> bool:
    # Without libtpu, /dev/vfio may hold other hardware that a host passes to this machine.
    return ("tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
            and importlib.util.find_spec("libtpu") is not None
            and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def _several_on_accelerators() -> bool:
    several = _on_tpu() or (FLAGS.num_processes or 1) > 1
    return several and os.environ.get("JAX_PLATFORMS") != "cpu"


def _keep_programs(folder: str | None):
    """Sets the folder that keeps compiled programs: --compilation_cache, or its default."""
    import jax

    unset = folder is None and jax.config.values["jax_compilation_cache_dir"] is None
    if unset and "config" in FLAGS and "workdir" in FLAGS and _several_on_accelerators():
        # Beside the run, which a restart on another machine finds, and not in it: programs are
        # executed, and nothing in a run's folder is.
        folder = f"{FLAGS.workdir.rstrip('/')}-programs"
    elif unset:
        # XLA divides a program among the CPU's cores when it compiles it, and jax does not tell two
        # such programs apart.
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        folder = os.path.expanduser(f"~/.cache/ntm_jax/programs/{len(cores)}-cores")
        if not os.path.isabs(folder):  # a user without a home
            return
        with contextlib.suppress(OSError):  # such as the home of a container's user
            os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder or None)


def _exit_now(status: int, text: str):
    """Prints to standard error and exits, without waiting for a save or for other processes."""
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized() and not jax.process_index():
        time.sleep(1)  # jax aborts the others when process 0 ends, and they may say the same
    os._exit(status)


def run(main):
    """Parses the flags, runs main() and exits.

    The status is 0 when done, 2 with one line on stderr for a user's mistake, full storage or too
    little memory, 75 with one line for a fault of the machines that a restart may mend, 1 with a
    traceback for any other exception, 130 when interrupted, and 141 when nobody reads its output
    any more. jax aborts a process, with status 134 in a shell, when another of its job is lost.
    """
    for stream in (sys.stdout, sys.stderr):
        _escape_controls(stream)
    # Imports and tracing make so many objects that looking for garbage takes a tenth of a start.
    gc.set_threshold(50_000)
    logging.set_verbosity(logging.WARNING)
    flags.DEFINE_multi_string(
        "import", [], "A module to import first, such as one that registers a data source; its "
        "file may be in the current directory")

    def call(_):
        host_memory.keep_freed()
        if "coordinator_address" in FLAGS:
            _keep_programs(FLAGS.compilation_cache)
            _join()
        main()

    about = sys.modules["__main__"]  # --help prints its docstring
    about.__doc__ = (about.__doc__ or "").replace("python -m launch.", START)
    try:
        app.run(call, flags_parser=_parse)
    except KeyboardInterrupt:
        _exit_now(130, "interrupted")
    except BrokenPipeError:  # such as `| head`
        os._exit(141)  # what a shell reports of a program that SIGPIPE ends
    except Exception as error:
        known = mistakes.of_a_program(error)
        if known is None:
            _exit_now(1, traceback.format_exc())
        _exit_now(75 if isinstance(known, MachineFault) else 2, _error(str(known)))
