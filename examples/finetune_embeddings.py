"""Fine-tuning all-MiniLM-L6-v2 for a few steps, with varlen attention forward and backward.

Each question is to lie nearer to the sentence that answers it than to the answers of all others
(the contrastive loss of van den Oord et al., "Representation Learning with Contrastive Predictive
Coding", 2018, over the cosines). The program trains the model of sentence_embeddings.py twice from
the same weights, once without padding through flash_attn_varlen_func and once padded with
Transformers' eager attention, and prints the losses side by side.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from sentence_embeddings import CORPUS, Embedder
from transformers.utils import logging

STEPS = 5
LEARNING_RATE = 1e-5
TEMPERATURE = 0.05
# Of |loss - eager's loss|, which is of size 1.
MAX_LOSS_DIFFERENCE = 1e-3

# A question, and how the sentence of CORPUS that answers it begins.
PAIRS = {
    "What should I do with the dough before I bake it?": "Knead the dough",
    "Where do I store my tomatoes?": "Ripe tomatoes",
    "How does one keep the smell in a roast?": "Roast the coffee",
    "When do the heavy rains come?": "Monsoon clouds",
    "Where does a storm get its strength?": "A warm ocean",
    "What can make a year colder everywhere?": "Volcanic ash",
    "How do insects pass on directions?": "Honeybees tell",
    "Which animals brought the trees back?": "Wolves that returned",
    "How do I study for an exam?": "Regular sleep",
    "My ankle hurts after a fall, what helps?": "A sprained ankle",
    "How far away are the stars?": "Light from the nearest",
    "How does a spacecraft get faster without an engine?": "The probe used",
    "What was it that made the instruments tremble?": "Two black holes",
    "Why have loans become so expensive?": "The central bank",
    "How do I make the look-ups fast?": "Sorting the table",
    "Who plays in an old hall?": "The cellist tuned",
}


def pairs() -> tuple[list[str], list[str]]:
    """The questions, and the sentence that answers each."""
    answers = [next(text for text in CORPUS if text.startswith(start)) for start in PAIRS.values()]
    return list(PAIRS), answers


def contrastive_loss(questions: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Of unit vectors [n, hidden_size]: answer i belongs to question i."""
    scores = questions @ answers.T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores)))


def first_places(embedder: Embedder) -> int:
    """How many questions are nearest to their own answer, among all sentences of the corpus."""
    questions, answers = pairs()
    nearest = (embedder(questions) @ embedder(CORPUS).T).argmax(1).tolist()
    return sum(CORPUS[number] == answer for number, answer in zip(nearest, answers))


def finetune(embedder: Embedder, steps: int = STEPS) -> list[float]:
    """The loss before each step and after the last. Dropout stays off, so that a second model sees
    the same."""
    questions, answers = pairs()
    optimizer = torch.optim.AdamW(embedder.model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps + 1):
        vectors = embedder.embed(questions + answers)
        loss = contrastive_loss(vectors[: len(questions)], vectors[len(questions) :])
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    losses, seconds, places = {}, {}, {}
    for attention in ("padding_free", "eager"):
        embedder = Embedder(attention)
        before = first_places(embedder)
        start = time.perf_counter()
        losses[attention] = finetune(embedder)
        seconds[attention] = (time.perf_counter() - start) / STEPS
        places[attention] = before, first_places(embedder)

    print(f"{len(PAIRS)} questions with their answers, {STEPS} steps of AdamW, fp32")
    print("step  flash_attn_varlen_func  eager attention, padded")
    for step, (loss, expected) in enumerate(zip(losses["padding_free"], losses["eager"])):
        print(f"{step:4}  {loss:22.5f}  {expected:23.5f}")
    before, after = places["padding_free"]
    print(f"questions nearest to their own answer: {before} before, {after} after")
    print(
        f"a step takes {seconds['padding_free'] * 1e3:.0f} ms, {seconds['eager'] * 1e3:.0f} eager"
    )
    difference = max(abs(a - b) for a, b in zip(losses["padding_free"], losses["eager"]))
    print(f"largest difference of a loss: {difference:.1e}")
    falls = losses["padding_free"][-1] < losses["padding_free"][0]
    return 0 if falls and difference < MAX_LOSS_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
