"""transformers loads what `export` writes, without code of ours, and computes the same."""

import families
import numpy as np
import pytest

from jaxheads.convert.export import export
from jaxheads.convert.load import load_model

pytestmark = [pytest.mark.peers, pytest.mark.optimised]

LENGTH = 60
TOLERANCE = 1e-4


@pytest.mark.parametrize("case", families.cases())
def test_transformers_loads_an_export_and_agrees(case, tmp_path):
    import torch
    import transformers

    model = load_model(families.materialise(case, tmp_path / "in"))
    export(model, tmp_path / "out")
    stored = families.reference(case)
    theirs, info = getattr(transformers, stored.config["architectures"][0]).from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.eval()
    given = {name: real(stored.inputs, name) for name in stored.inputs if name.endswith("tokens")}
    pixels = stored.inputs.get("pixels")
    with torch.no_grad():
        if hasattr(model, "vision"):
            images = torch.tensor(pixels).permute(0, 3, 1, 2)
            out = theirs(input_ids=torch.tensor(given["tokens"]), pixel_values=images)
            ours = model.compare(model.text(given["tokens"]).pooled, model.vision(pixels).pooled)
            expected = out.logits_per_image
        elif pixels is not None:
            out = theirs(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2))
            ours, expected = first_output(model(pixels, taps="final"), out)
        elif hasattr(model, "decoder"):
            source, target = given["source_tokens"], given["target_tokens"]
            out = theirs(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target))
            ours, expected = model(source, target).logits, out.logits
        else:
            tokens = given["tokens"]
            out = theirs(input_ids=torch.tensor(tokens))
            ours, expected = first_output(model(tokens, taps="final"), out)
    ours, expected = np.asarray(ours, np.float64), expected.double().numpy()
    assert np.abs(ours - expected.reshape(ours.shape)).max() < TOLERANCE * np.abs(expected).max()


def real(inputs, name):
    """Some tokens that are padding in no row: models differ in how they count it."""
    mask = inputs[name.replace("tokens", "mask")].all(axis=0)
    return inputs[name][:, mask][:, :LENGTH]


def first_output(ours, theirs):
    """Logits of both, or the last states of models without a head."""
    if ours.logits is None:
        return ours.taps["final"], theirs.last_hidden_state
    return ours.logits, theirs.logits
