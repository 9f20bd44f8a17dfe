"""What the tests of Inception share: random weights of the real network."""

import pytest


def random_inception() -> dict:
    """The network's state in PyTorch, scaled so that activations do not vanish.

    Skips the test where torch or torch-fidelity is not installed.
    """
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        state = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, array in state.items():
        if array.ndim == 4:
            array.normal_(0, (2 / array[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            array.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("bn.bias", "running_mean")):
            array.normal_(0, 0.1, generator=generator)
    return state
