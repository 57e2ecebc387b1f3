"""FP8 directories for tests, and what they mean in plain torch: the reference of what a server computes from them."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.conversion import tensors_of

LARGEST = 448.0
QUESTIONS = [f"What is {number} + {number}, and why {'so ' * number}?" for number in range(6)]
SCALES = (".weight_scale", ".input_scale", ".weight_scale_inv")
WHOLE_BLOCKS = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64}


def write_questions(path: Path, questions=QUESTIONS) -> Path:
    """Rows as a run's data set has them."""
    path.write_text("".join(json.dumps({"question": question, "answer": "4"}) + "\n" for question in questions))
    return path


def dequantized(path: Path) -> dict[str, Tensor]:
    """Every weight of the model in float32, without the scales. Blocks are gone through one by one."""
    tensors = tensors_of(path)
    weights = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(SCALES)}
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale"):
            weights[name.removesuffix("_scale")] *= tensor
        if name.endswith(".weight_scale_inv"):
            weight = weights[name.removesuffix("_scale_inv")]
            for row in range(tensor.shape[0]):
                for column in range(tensor.shape[1]):
                    weight[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)] *= tensor[row, column]
    return weights


def served_model(path: Path, original: Path, *, round_inputs: bool):
    """transformers' model in float32 with the weights of FP8 directory `path` and the config of `original`.

    round_inputs: of linear maps, with their fixed scales, as a server does; not those of experts.
    """
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as directory:
        shutil.copyfile(original / "config.json", Path(directory) / "config.json")
        save_file(dequantized(path), Path(directory) / "model.safetensors", metadata={"format": "pt"})
        model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found

    def rounding(scale):
        def hook(module, inputs):
            return ((inputs[0] / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale,)

        return hook

    for name, scale in tensors_of(path).items():
        if round_inputs and name.endswith(".input_scale") and ".experts." not in name:
            model.get_submodule(name.removesuffix(".input_scale")).register_forward_pre_hook(rounding(scale))
    return model


def last_logits(model, prompts: list[list[int]]) -> Tensor:
    """Logits [prompts, vocabulary] after each prompt."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([prompt])).logits[:, -1] for prompt in prompts])


def assert_rounded(found: Tensor, original: Tensor, scale: Tensor | float) -> None:
    """Within half a step of float8_e4m3fn: 2^-4 of the value, or 2^-10 scales among the smallest."""
    allowed = torch.maximum(original.abs() * 2.0**-4, torch.as_tensor(scale) * 2.0**-10)
    assert ((found - original).abs() <= allowed * (1 + 1e-5)).all()
