"""What every program starts with: flags parsed by absl, and a user's mistake ended in one line with status 2."""

import errno
import os
import re
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from ntm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_config(required: bool = True, flag_values: flags.FlagValues = FLAGS):
    """Defines --config, an experiment with --config.section.key=value overrides."""
    config_flags.DEFINE_config_file(
        "config", None, "An experiment: digits, or a file such as experiments/digits.py.",
        flag_values=flag_values, lock_config=True)
    if required:
        flags.mark_flag_as_required("config", flag_values)


def define_workdir(help_text: str):
    """--workdir, required."""
    flags.DEFINE_string("workdir", None, help_text)
    flags.mark_flag_as_required("workdir")


def define_processes():
    """How several processes of one job meet; on TPU hosts the environment says it, and these stay unset."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for a job of several processes: those "
                        "that were started differently, or find the port taken, end within 10 s, with status 2.")
    flags.DEFINE_integer("num_processes", None, "How many processes the job has.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.", lower_bound=0)
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the last process to come; then all end, with status 2.", lower_bound=1)
    flags.DEFINE_integer("heartbeat_timeout", 60, "Seconds after which a silent process counts as dead. The others end within 10 s more, "
                         "with status 1 or -6 (134 in a shell).", lower_bound=1)
    flags.DEFINE_string("compilation_cache", None, "A folder that keeps compiled programs for the next start.")


def span(name: str) -> tuple[int, int] | None:
    """The flag START:STOP called `name` as two numbers; exits with a line where it is something else."""
    value = FLAGS[name].value
    if value is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", value)
    if not match or int(match[1]) >= int(match[2]):
        _fail(f"--{name}={value}: expected START:STOP, two numbers of steps, the first the smaller")
    return int(match[1]), int(match[2])


def _fail(message: str):
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _mistake(error) -> str:
    """What flags and config_flags say of a mistake, as one line without their wrappings."""
    while isinstance(error.args[0] if error.args else None, Exception):
        error = error.args[0]  # absl's AttributeError(KeyError(...))
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Failed loading config file" in text:
        return f"{_config_flag()} cannot be read: expected an experiment file, such as --config=experiments/digits.py"
    if isinstance(error, SyntaxError):
        return f"{_config_flag()} is not a Python file: {text}"
    if "Traceback" in text:  # an exception that get_config() raised
        return f"{_config_flag()}: {text.strip().splitlines()[-1].partition(': ')[2]}"
    unknown = re.match(r"""'(\w+)'\s*(?:Did you mean "(\w+)")?""", text)
    if unknown:
        meant = f", did you mean {unknown[2]}?" if unknown[2] else ""
        full = next((a for a in sys.argv if re.match(rf"--?(no)?config\..*\b{unknown[1]}\b", a)), unknown[1])
        return f"{full} is not a setting of the experiment: there is no {unknown[1]}{meant}"
    if "does not support indexing" in text:
        return f"config.{text.split()[-1]} is not a setting of the experiment: what comes before its last dot is a value, not a section"
    text = re.sub(r"^(FATAL Flags parsing error:|flag)\s*", "", text)
    for said, expected in (("invalid literal for int", "expected a whole number, such as 1000"),
                           ("could not convert string to float", "expected a number"), ("('Non-boolean", "expected true or false")):
        text = f"{text.partition(said)[0]}{expected}" if said in text else text
    return text


def _config_flag() -> str:
    return next((a for a in sys.argv if re.match(r"--?config=", a)), "--config")


def _parse(argv):
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config:
            flags.FLAGS.config.keys()  # config_flags keeps a file that it cannot read for the first use
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        _fail(_mistake(error))
    for name in ("workdir", "out", "input"):
        if name in flags.FLAGS and flags.FLAGS[name].present and not flags.FLAGS[name].value:
            _fail(f"--{name} is empty: give a folder, such as --{name}=runs/digits")
    if len(rest) > 1:
        _fail(f"stray argument {rest[1]!r}: every setting is written --name=value, and a switch --config.flag or --noconfig.flag")
    return rest


def _start():
    """Before main(): the compilation cache, and the other processes of the job."""
    if "coordinator_address" in FLAGS:
        import jax

        from ntm_jax.runtime import processes

        if FLAGS.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", FLAGS.compilation_cache)
        processes.join(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, FLAGS.join_timeout, FLAGS.heartbeat_timeout)


def _mistaken(error: UserError):
    """One line and status 2, at once: an orderly end would wait for the job's other processes, or for a save that cannot succeed."""
    line = f"error: {' '.join(str(error).split())}"
    _leave_job(2, line)
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)


def _leave_job(status: int, line: str):
    """Ends this process at once with a line if it is one of a job of several."""
    if "jax" in sys.modules:
        from ntm_jax.runtime import processes

        if processes.joined():
            processes.leave(status, line)


def _fail_in_job(error: Exception):
    """Ends this process at once if it is one of a job of several: with a line where another is gone, else with the traceback."""
    if "jax" in sys.modules:
        from ntm_jax.runtime import processes

        if processes.joined():
            processes.fail(error)


FOLDER = "a file stands where a folder is needed: give another folder"
REMEDIES = {
    errno.ENOSPC: "free disk space there", errno.EDQUOT: "free disk space there",
    errno.EFBIG: "raise the limit on a file's size, ulimit -f",
    errno.EROFS: "make it writable, or give another folder", errno.EACCES: "make it readable and writable, or give another folder",
    errno.EPERM: "make it readable and writable, or give another folder", errno.ENOTDIR: FOLDER, errno.EEXIST: FOLDER,
    errno.EISDIR: "a folder stands where a file is needed: give another name", errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "the disk fails: give another folder", errno.ENOENT: "it is not there: expected a file or folder of that name",
    errno.ESTALE: "the network disk is gone: mount it again",
}
LESS_MEMORY = ("lower config.data.batch_size, config.evaluate.batch_size or --batch, raise config.train.accumulate, or set "
               "config.model.remat=full")


def _of_the_file_system(error: OSError) -> str | None:
    """The line for an error of the file system; None for another error."""
    if error.errno not in REMEDIES or isinstance(error, ConnectionError):
        return None
    return (f"{error.filename or 'a file'}: {error.strerror}: {REMEDIES[error.errno]}; what was written before is intact, and the same "
            "command goes on once that is mended")


def _of_memory(error: Exception) -> str | None:
    """The line for an error of memory; None for another error."""
    if isinstance(error, MemoryError):
        return f"this machine's memory is full ({error or 'no details'}): {LESS_MEMORY}"
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return f"a device's memory is full ({str(error).splitlines()[0][:200]}): {LESS_MEMORY}"
    return None


def run(main):
    """Parses the flags, runs main() and exits: 0 when done, 2 with one line on stderr for a user's mistake, a file system that cannot be
    written to, or too little memory, 130 when interrupted."""
    logging.set_verbosity(logging.WARNING)

    def call(_):
        try:
            _start()
            main()
        except UserError as error:
            _mistaken(error)
        except KeyboardInterrupt:
            _leave_job(130, "interrupted")
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:
            line = _of_the_file_system(error) if isinstance(error, OSError) else _of_memory(error)
            if line:
                _mistaken(UserError(line))
            _fail_in_job(error)
            raise

    app.run(call, flags_parser=_parse)
