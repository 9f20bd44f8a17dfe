"""Names that earlier versions had, which their files and command lines are still read with."""

import re

NAMES = {  # settings by section.key, and flags
    "data.text": "data.text_encoder",
    "model.transporter_text": "model.transporter_condition",
    "train.level_power": "train.level_weight_power",
    "optimizer.floor": "optimizer.min_learning_rate",
    "evaluate.images": "evaluate.num_samples",
    "reward.ahead": "reward.prefetch",
    "reward.anchor": "reward.data_loss_weight",
    "reward.trains": "reward.trainable",
    "enough": "stop_nats",
    "latents": "autoencoder",
}
VALUES = {
    "model.head=posterior": "flow_matching",
    # of models of texts; transporters of classes always saw them
    "model.transporter_condition=False": "class",
    "model.transporter_condition=True": "text",
}
VARIANTS = {  # of experiments
    "runlocal": "smoke", "runlocal-denoiser": "denoiser,smoke", "runlocal-reward": "reward,smoke"}


def current(settings: dict, section: str = "") -> dict:
    """Settings, nested by section or flat by section.key, under their present names."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = current(value, f"{key}.")
        else:
            name = NAMES.get(f"{section}{key}", f"{section}{key}")
            found[name.removeprefix(section)] = VALUES.get(f"{name}={value}", value)
    return found


def argument(given: str) -> str:
    """An argument of a command line, --flag=value or --config.section.key=value, likewise."""
    found = re.fullmatch(r"(--?(?:no)?(?:config\.)?)([\w.]+)(?:=(.*))?", given, re.DOTALL)
    if not found or found[2] not in NAMES:
        return given
    name, value = NAMES[found[2]], found[3]
    if value is None:
        return f"{found[1]}{name}"
    return f"{found[1]}{name}={VALUES.get(f'{name}={value}', value)}"
