"""What every program starts with: flags parsed by absl, and a user's mistake ended in one line with status 2."""

import os
import re
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from ntm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_config():
    """--config, an experiment file with --config.key=value overrides."""
    config_flags.DEFINE_config_file("config", None, "An experiment file, such as experiments/digits.py.", lock_config=True)
    flags.mark_flag_as_required("config")


def define_workdir(help_text: str):
    """--workdir, required."""
    flags.DEFINE_string("workdir", None, help_text)
    flags.mark_flag_as_required("workdir")


def _fail(message: str):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv):
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        _fail(re.sub(r"^FATAL Flags parsing error:\s*", "", text))
    if len(rest) > 1:
        _fail(f"stray argument {rest[1]!r}: every setting is written --name=value, and a switch --config.flag or --noconfig.flag")
    return rest


def run(main):
    """Parses the flags, runs main() and exits: 0 when done, 2 with one line on stderr for a user's mistake."""
    logging.set_verbosity(logging.WARNING)

    def call(_):
        try:
            main()
        except UserError as error:
            _fail(str(error))

    app.run(call, flags_parser=_parse)
