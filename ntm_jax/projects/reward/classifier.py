"""The classifier of the reward `classifier`: trained on a source's classes, and kept in a file.

Its architecture is that of the features `cnn`. Its seed is another, so that scores by these
features do not come from the network that the samples are made to please.
"""

import json

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from ntm_jax import files
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import features

SEED = 1
REMEDY = "name another file, into which one is trained and written"


def saved(file: str, source: Source):
    """A function of images [n, H, W, C] -> log-probabilities [n, classes], in nats.

    The classifier is read from a safetensors file. Where there is no such file, or its name is
    empty, it is trained on the source, and then written there. Raises UserError for a source
    without classes, and for a file that holds another network or a classifier of other data.
    """
    features.check_classes(source)
    if file and epath.Path(file).exists():
        params = _read(file, source)
    else:
        params = jax.device_get(features.fit_classifier(source, SEED))
        if file and jax.process_index() == 0:
            about = {"classes_of": source.name, "class_names": json.dumps(source.class_names)}
            files.write(file, safetensors.numpy.save(_flat(params), about))

    def log_probabilities(images):
        logits = features.classify(source, params, images)[1].astype(np.float64)
        return logits - np.logaddexp.reduce(logits, 1, keepdims=True)

    return log_probabilities


def _flat(params) -> dict:
    """{"layer/name": array}."""
    return dict(traverse_util.flatten_dict(params, sep="/"))


def _read(file: str, source: Source) -> dict:
    shapes = {name: a.shape for name, a in _flat(features.abstract_classifier(source)).items()}
    content = files.regular(file).read_bytes()
    flat = safetensors.numpy.load(content)
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    if {name: a.shape for name, a in flat.items()} != shapes:
        raise UserError(f"{file} holds another network than a classifier of the "
                        f"{source.num_classes} classes of {source.name}: {REMEDY}")
    # Sources of one kind, such as a folder that has moved, may have the same classes.
    theirs = header.get("__metadata__", {}).get("classes_of", source.name)
    if theirs.partition(":")[0] != source.name.partition(":")[0]:
        raise UserError(f"{file} holds a classifier of {theirs}, whose classes are not those of "
                        f"{source.name}: {REMEDY}")
    return traverse_util.unflatten_dict(flat, sep="/")
