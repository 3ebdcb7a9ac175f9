"""PEFT's own weighted-combination tests, run against our engine.

    pip install parameterized diffusers
    python benchmarks/peft_suite.py PATH_OF_A_PEFT_CHECKOUT

Every ``LoraModel.add_weighted_adapter`` is answered by ``loraloom.merge``: both adapters are taken from the live model,
merged, and put back. ``cat`` is ours; the types that end in ``svd`` run on dense updates at the rank that is asked for;
the others, which PEFT computes on the factors, run on the updates too, cut to the rank of the inputs (our factor space
refuses negative weights, which PEFT's tests use). PEFT's checks of its arguments are left in place. Models of the hub
are replaced by tiny random ones of the same name. Nothing of PEFT's is copied here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

METHODS = {"linear": "svd", "cat": "cat", "svd": "svd", "ties": "ties", "magnitude_prune": "magnitude"}
METHODS |= {"dare_linear": "dare", "dare_ties": "dare_ties"}
MODELS = ("OPTForCausalLM", "GPT2LMHeadModel", "LlamaForCausalLM")
CALLS = "LORALOOM_BRIDGE_CALLS"


def add_weighted_adapter(self: Any, adapters: list, weights: list, adapter_name: str, *given: Any, **more: Any) -> None:
    """What stands in for PEFT's method of this name."""
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    import loraloom as ll
    from loraloom.integrations.peft import _plain
    from loraloom.layout import from_state_dict, settled, to_state_dict

    kind = given[0] if given else more.get("combination_type", "svd")
    if adapter_name in self.peft_config:
        return
    kind, rank, targets = self._check_add_weighted_adapter(adapters, kind, more.get("svd_rank"))
    held = []
    for name in adapters:  # a LoraModel's keys lack the first part of a PeftModel's
        live = {f"base_model.{key}": value for key, value in get_peft_model_state_dict(self, adapter_name=name).items()}
        held.append(from_state_dict(_plain(self.peft_config[name].to_dict()), live))
    method = METHODS[kind.removesuffix("_svd")]
    density = {"density": more["density"]} if more.get("density") else {}
    extras = "average" if sum(bool(one.extras) for one in held) > 1 else "refuse"
    cut = None if kind == "cat" else rank
    merged = ll.merge(held, method, weights, rank=cut, extras=extras, **density).loaded()
    ranks = {name: factors.rank for name, factors in merged.modules.items()}
    said = settled(merged.config, ranks, bake=True, retarget=False)
    keys = (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "fan_in_fan_out",
        "task_type",
    )
    config = LoraConfig(**{key: said[key] for key in keys if key in said}, target_modules=targets)
    self.peft_config[adapter_name] = config
    self.inject_adapter(self.model, adapter_name)
    tensors = {key.removeprefix("base_model."): value for key, value in to_state_dict(merged)}
    set_peft_model_state_dict(self, tensors, adapter_name=adapter_name)
    with Path(os.environ[CALLS]).open("a") as log:
        log.write(f"{kind}\n")


def pytest_configure() -> None:
    """As a pytest plugin: put our method in place, and let no test ask the hub."""
    from peft.tuners.lora.model import LoraModel

    LoraModel.add_weighted_adapter = add_weighted_adapter
    try:
        from tests import testing_utils
    except ImportError:
        return

    class Everything(Counter):
        def __contains__(self, key: object) -> bool:
            return True

    testing_utils._HUB_MODEL_ACCESSES = Everything()


def stand_ins(folder: Path) -> None:
    """Tiny random models under the names that the tests ask for; pytest runs beside them."""
    import transformers

    sizes = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "n_embd": 16}
    sizes |= {"n_layer": 2, "n_head": 2, "ffn_dim": 32, "intermediate_size": 32, "word_embed_proj_dim": 16}
    for kind in MODELS:
        maker = getattr(transformers, kind)
        known = {k: v for k, v in sizes.items() if hasattr(maker.config_class(), k) or k in ("hidden_size",)}
        model = maker(maker.config_class(**known))
        for owner in ("peft-internal-testing", "trl-internal-testing", "hf-internal-testing"):
            model.save_pretrained(folder / owner / f"tiny-random-{kind}")


def main() -> int:
    """Run the selection; pytest's exit status."""
    checkout = Path(sys.argv[1]).resolve()
    models = " or ".join(f"tiny-random-{kind}" for kind in MODELS)
    with tempfile.TemporaryDirectory() as work:
        stand_ins(Path(work))
        calls = Path(work) / "calls"
        calls.touch()
        paths = os.pathsep.join([str(Path(__file__).parent), str(checkout)])
        environment = {**os.environ, "PYTHONPATH": paths, CALLS: str(calls), "HF_HUB_OFFLINE": "1"}
        files = [str(checkout / "tests" / name) for name in ("test_custom_models.py", "test_decoder_models.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite", "-p", "no:cacheprovider", *files]
        command += ["-c", os.devnull, "--rootdir", str(checkout), "-W", "ignore"]
        command += ["-k", f"(add_weighted or merging_adapters) or (weighted_combination and LoraConfig and ({models}))"]
        status = subprocess.run(command, cwd=work, env=environment, check=False).returncode
        done = calls.read_text().split()
        print(
            f"{len(done)} merges by loraloom: {', '.join(f'{kind} {done.count(kind)}' for kind in sorted(set(done)))}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
