"""Question/answer matching: an LSTM reads both sides, pairwise attention compares them word by word.

    python answer_matching.py                      the questions of the package chatterbot-corpus
    python answer_matching.py --data pairs.tsv     your own, one "question<TAB>answer" a line, UTF-8
    python answer_matching.py --ask "Who are you?" ... and the best answer of all to a question of yours

A quarter of the questions is held out, and none of their right answers is trained on. For each of those the
model ranks 20 answers, the right one and 19 of other held-out questions, and is compared with a random order,
with the words in common, of which rare ones count more (idf), and with itself before training.
"""

import argparse
import importlib.util
import math
import random
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from gatematch.attention import pairwise_attention
from gatematch.lstm import LSTM

CANDIDATES, BATCH, LONGEST = 20, 16, 24  # answers to rank, questions a step, words of a text that are read


def read_pairs(path):
    """(question, answer) of every line of the file; None: of every conversation's start in the corpus."""
    if path is not None:
        lines = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return [(line[0], line[1]) for line in lines if len(line) > 1]
    import yaml

    folder = Path(importlib.util.find_spec("chatterbot_corpus").submodule_search_locations[0])
    files = sorted(folder.glob("data/english/*.yml"))
    talks = [talk for file in files for talk in yaml.safe_load(file.read_text("utf-8"))["conversations"]]
    return [(str(talk[0]), str(talk[1])) for talk in talks if isinstance(talk, list) and len(talk) > 1]


def words(text):
    return re.findall(r"\w+(?:'\w+)*", text.lower())[:LONGEST]


class Matcher(nn.Module):
    """Scores of question/answer pairs, from the similarities of their words before and behind the LSTM."""

    def __init__(self, idf, features=64, hidden=32):
        super().__init__()
        self.register_buffer("idf", idf)  # of each word; 0 for padding, word 0
        self.embedding = nn.Embedding(len(idf), features)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.dropout = nn.Dropout(0.3)
        self.lstm = LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.weigh = nn.Linear(5, 1, bias=False)
        nn.init.constant_(self.weigh.weight, 5.0)

    def read(self, texts):
        """Of word numbers (N, T), padded with 0: e (N, T, D), h (N, T, 2H), lengths (N,), weights (N, T)."""
        lengths = (texts > 0).sum(1)
        e = self.dropout(self.embedding(texts))
        h, _ = self.lstm(e, lengths=lengths)
        return e, h, lengths, self.idf[texts]

    def forward(self, questions, answers):
        """Scores (Q, A) of every question (Q, T) with every answer (A, T')."""
        Q, A = len(questions), len(answers)
        e_q, h_q, n_q, w_q = (x.repeat_interleave(A, 0) for x in self.read(questions))  # one row a pair
        e_a, h_a, n_a, w_a = (x.repeat(Q, *[1] * (x.dim() - 1)) for x in self.read(answers))
        similarities = []
        for q, a in ((e_q, e_a), (h_q, h_a)):
            S = pairwise_attention(q, a, n_q, n_a)  # (Q * A, T, T'), 0 for padding, in the graph
            similarities += [mean(S.amax(2), w_q), mean(S.amax(1), w_a)]  # each word's best match
        similarities.append(F.cosine_similarity(mean(h_q, w_q), mean(h_a, w_a)))
        return self.weigh(torch.stack(similarities, 1)).view(Q, A)


def mean(values, weights):
    """Mean over dim 1 of (N, T) or (N, T, D) with the weights (N, T)."""
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
    return torch.einsum("nt...,nt->n...", values, shares)


def evaluate(score, lists):
    """Of every list, whose first answer is the right one: 1 / its rank, and whether it is ranked first.

    Answers with equal scores are in no order: their measures are the mean over all orders.
    """
    ranks, firsts = [], []
    for question, answers in lists:
        scores = score(question, answers)
        above = sum(s > scores[0] for s in scores)
        equal = sum(s == scores[0] for s in scores)
        ranks.append(sum(1 / (above + k + 1) for k in range(equal)) / equal)
        firsts.append((above == 0) / equal)
    return torch.tensor([ranks, firsts])


def summary(measures):
    """MRR with its standard error, and accuracy at 1."""
    ranks, firsts = measures
    return ranks.mean().item(), (ranks.std() / len(ranks) ** 0.5).item(), firsts.mean().item()


def positive(text):
    """For argparse: an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="tab-separated questions and answers; default: chatterbot-corpus")
    parser.add_argument("--ask", help="a question to answer from all answers of the data")
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    parser.add_argument("--json", help="a results file to write")
    args = parser.parse_args()
    if args.json and Path(args.json).is_dir():
        parser.error(f"--json must be a file; {args.json} is a folder")
    if args.data is None and not all(map(importlib.util.find_spec, ("chatterbot_corpus", "yaml"))):
        parser.error("no data: pip install chatterbot-corpus pyyaml, or pass --data pairs.tsv")
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    try:
        pairs = read_pairs(args.data)
    except OSError as error:
        parser.error(f"--data: {args.data} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        parser.error(f"--data: {args.data} is no text in UTF-8")
    if not pairs:
        parser.error(f"--data {args.data}: no line has a tab, which separates a question from its answer")
    right = {}  # question -> its right answers; the same words are the same question
    for question, answer in pairs:
        if words(question) and words(answer):
            right.setdefault(" ".join(words(question)), []).append(answer.strip())
    questions = rng.sample(list(right), len(right))
    held, rest = questions[: len(questions) // 4], questions[len(questions) // 4 :]
    wrong = sorted({answer for q in held for answer in right[q]})
    train = [q for q in rest if not set(right[q]) & set(wrong)]  # no answer of those held out
    if len(wrong) < 2 * CANDIDATES or len(train) < BATCH:
        parser.error(
            f"too little data: the {len(held)} questions held out, a quarter, have {len(wrong)} different "
            f"answers, and {len(train)} others share none of these; {2 * CANDIDATES} and {BATCH} are needed"
        )
    lists = [
        (q, [right[q][0], *rng.sample([a for a in wrong if a not in right[q]], CANDIDATES - 1)]) for q in held
    ]

    # Numbers for all words; what is learned of a word, its idf too, comes from the training questions alone.
    texts = [words(text) for q in questions for text in (q, *right[q])]
    number = {word: n for n, word in enumerate(sorted({word for text in texts for word in text}), 1)}
    if args.ask is not None and not set(words(args.ask)) & set(number):
        parser.error("--ask: none of its words is in the data")
    seen = [set(words(text)) for q in train for text in (q, *right[q])]
    count = Counter(word for text in seen for word in text)
    idf = [0.0, *(math.log((1 + len(seen)) / (1 + count[word])) for word in number)]

    def encode(texts):
        rows = [[number[word] for word in words(text) if word in number] or [0] for text in texts]
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    model = Matcher(torch.tensor(idf))

    def learned(question, answers):
        with torch.no_grad():
            return model.eval()(encode([question]), encode(answers))[0].tolist()

    def overlap(question, answers):
        common = [set(words(question)) & set(words(answer)) for answer in answers]
        return [math.fsum(idf[number[word]] for word in each) for each in common]

    results = {
        "random order": evaluate(lambda question, answers: [0.0] * len(answers), lists),
        "words in common, by idf": evaluate(overlap, lists),
        "model, untrained": evaluate(learned, lists),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(args.epochs):
        model.train()
        total, order = 0.0, rng.sample(train, len(train))
        for batch in (order[n : n + BATCH] for n in range(0, len(order) - BATCH + 1, BATCH)):
            answers = [rng.choice(right[q]) for q in batch]
            # In-batch negatives: the right answers of the others, unless they are right here as well.
            also = [[i != j and a in right[q] for j, a in enumerate(answers)] for i, q in enumerate(batch)]
            scores = model(encode(batch), encode(answers)).masked_fill(torch.tensor(also), -math.inf)
            loss = F.cross_entropy(scores, torch.arange(BATCH))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / (len(train) // BATCH):.3f}", flush=True)
    results["model, trained"] = evaluate(learned, lists)

    print(f"\n{len(train)} questions to train on, {len(held)} held out, {CANDIDATES} answers each")
    results["trained - untrained"] = results["model, trained"] - results["model, untrained"]  # by question
    rows = {name: summary(measures) for name, measures in results.items()}
    for name, (mrr, error, accuracy) in rows.items():
        print(f"{name:23} MRR {mrr:.3f} ± {error:.3f}, accuracy at 1 {accuracy:.3f}")
    for question, answers in lists[:3]:
        scores = learned(question, answers)
        best = scores.index(max(scores))
        print(f"\nQ: {question}\nA: {answers[best]}{'' if best == 0 else f' (right: {answers[0]})'}")
    if args.ask:
        answers = sorted({answer for q in questions for answer in right[q]})
        scores = learned(args.ask, answers)
        print(f"\nQ: {args.ask}\nA: {answers[scores.index(max(scores))]}")

    if args.json:
        from gatematch.bench.results import describe_machine, write_results

        keys = ("case", "MRR", "standard error", "accuracy at 1")
        table = [
            dict(zip(keys, (f"example/{name}", *(round(value, 3) for value in values)), strict=True))
            for name, values in rows.items()
        ]
        write_results(Path(args.json), describe_machine(torch.device("cpu")), table)

    if all(getattr(args, name) == parser.get_default(name) for name in ("data", "epochs", "seed")):
        assert all(p.grad.abs().sum() > 0 for p in model.lstm.parameters()), "no gradient reached the LSTM"
        gain, error, _ = rows["trained - untrained"]
        assert gain > error, "training gains less than a standard error"


if __name__ == "__main__":
    main()
